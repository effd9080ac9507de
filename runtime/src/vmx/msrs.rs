//! The MSR areas of VM entry and VM exit, and the MSR bitmaps (SDM Vol 3C, "Loading MSRs", "Saving MSRs", "MSR-Bitmap Address").

use twofold_arch::msr;
use twofold_arch::vmx::Field;

use super::{bitmap_bit, read_u64, write_phys};
use crate::cpu::msr as file;
use crate::vcpu::Vcpu;

/// Entries of an MSR area that are looked at: what IA32_VMX_MISC recommends as the most software uses.
const MOST: u64 = 512;
/// SMI-handler base: never in an MSR area.
const SMM_MONITOR_CTL: u32 = 0x9b;
/// IA32_BIOS_UPDT_TRIG.
const BIOS_UPDT_TRIG: u32 = 0x79;

/// An MSR whose bits 31:8 are those of the x2APIC's.
fn is_x2apic(index: u32) -> bool {
    index >> 8 == 8
}

/// Loads the `count` MSRs of the area at `at`.
///
/// # Errors
/// The number of the entry that failed, the first being 1.
pub fn load(v: &mut Vcpu, count: u64, at: u64) -> Result<(), u64> {
    for n in 0..count {
        let entry = at.wrapping_add(16 * n);
        let (head, value) = (read_u64(v, entry), read_u64(v, entry.wrapping_add(8)));
        let index = head as u32;
        let bad = n >= MOST
            || head >> 32 != 0
            || is_x2apic(index)
            || matches!(index, msr::FS_BASE | msr::GS_BASE | SMM_MONITOR_CTL | BIOS_UPDT_TRIG);
        if bad || file::write(v, index, value).is_err() {
            return Err(n + 1);
        }
    }
    Ok(())
}

/// Stores the `count` MSRs named in the area at `at`.
///
/// # Errors
/// The number of the entry that failed, the first being 1.
pub fn store(v: &mut Vcpu, count: u64, at: u64) -> Result<(), u64> {
    for n in 0..count {
        let entry = at.wrapping_add(16 * n);
        let head = read_u64(v, entry);
        let index = head as u32;
        if n >= MOST || head >> 32 != 0 || is_x2apic(index) || index == SMM_MONITOR_CTL {
            return Err(n + 1);
        }
        let value = file::read(v, index).map_err(|_| n + 1)?;
        write_phys(v, entry.wrapping_add(8), &value.to_le_bytes());
    }
    Ok(())
}

/// Whether RDMSR or WRMSR of `index` exits, with "use MSR bitmaps" set.
#[must_use]
pub fn intercepted(v: &Vcpu, index: u32, write: bool) -> bool {
    let half = match index {
        0..=0x1fff => 0,
        0xc000_0000..=0xc000_1fff => 0x400,
        _ => return true,
    };
    let base = v.vmx.vmcs.get(Field::MsrBitmap);
    bitmap_bit(v, base.wrapping_add(half + if write { 0x800 } else { 0 }), u64::from(index & 0x1fff))
}
