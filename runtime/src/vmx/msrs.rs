//! The MSR areas of VM entry and VM exit, and the MSR bitmaps (SDM Vol 3C, "Loading MSRs", "Saving MSRs", "MSR-Bitmap Address").

use twofold_arch::msr;
use twofold_arch::vmx::Field;

use super::checks::{Detail, MsrArea, msr_entry};
use super::{bitmap_bit, read_u64, write_phys};
use crate::cpu::msr as file;
use crate::vcpu::Vcpu;

/// Entries of an MSR area that are processed: as many as IA32_VMX_MISC (bits 27:25 are 0) recommends as the most.
const MOST: u64 = 512;

fn is_x2apic(v: &mut Vcpu) -> bool {
    const EXTD: u64 = 1 << 10;
    file::read(v, msr::APIC_BASE).is_ok_and(|base| base & EXTD != 0)
}

/// The number of an entry that was refused, the first being 1, and why.
pub type Refused = (u64, Detail);

fn refused(n: u64, words: &str) -> Refused {
    (n + 1, words.into())
}

/// Loads the `count` MSRs of the area at `at`.
///
/// # Errors
/// The entry that failed.
pub fn load(v: &mut Vcpu, area: MsrArea, count: u64, at: u64) -> Result<(), Refused> {
    let x2apic = is_x2apic(v);
    for n in 0..count {
        let entry = at.wrapping_add(16 * n);
        let (head, value) = (read_u64(v, entry), read_u64(v, entry.wrapping_add(8)));
        let index = head as u32;
        msr_entry(area, index, (head >> 32) as u32, x2apic).map_err(|detail| (n + 1, detail))?;
        if n >= MOST {
            return Err(refused(n, "the area is too long"));
        }
        if file::write(v, index, value).is_err() {
            return Err((n + 1, format!("WRMSR of {value:#x} to MSR {index:#x} would fault").into()));
        }
    }
    Ok(())
}

/// Stores the `count` MSRs named in the area at `at`. The time-stamp counter is that of `start`, when the exit began.
///
/// # Errors
/// The entry that failed.
pub fn store(v: &mut Vcpu, count: u64, at: u64, start: u64) -> Result<(), Refused> {
    let x2apic = is_x2apic(v);
    for n in 0..count {
        let entry = at.wrapping_add(16 * n);
        let head = read_u64(v, entry);
        let index = head as u32;
        msr_entry(MsrArea::ExitStore, index, (head >> 32) as u32, x2apic).map_err(|detail| (n + 1, detail))?;
        if n >= MOST {
            return Err(refused(n, "the area is too long"));
        }
        let value = match index {
            msr::TSC => start.wrapping_add(v.state.msrs.tsc_offset),
            _ => file::read(v, index).map_err(|_| refused(n, "RDMSR would fault"))?,
        };
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
