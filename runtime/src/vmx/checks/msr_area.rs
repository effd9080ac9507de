//! What an entry of an MSR area may name (SDM Vol 3C, "Loading MSRs", "Saving MSRs").
//!
//! The rest of the rule, that WRMSR or RDMSR would not fault, is for the one who does it.

use twofold_arch::msr;

use super::{Detail, require};

/// Which of the three areas.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum MsrArea {
    /// The VM-entry MSR-load area.
    EntryLoad,
    /// The VM-exit MSR-store area.
    ExitStore,
    /// The VM-exit MSR-load area.
    ExitLoad,
}

/// IA32_BIOS_UPDT_TRIG.
const BIOS_UPDT_TRIG: u32 = 0x79;
/// IA32_SMM_MONITOR_CTL.
const SMM_MONITOR_CTL: u32 = 0x9b;
/// IA32_SMBASE.
const SMBASE: u32 = 0x9e;

/// Whether an entry with MSR number `number` and `reserved` in its bytes 7:4 may be in `area`; `x2apic`: the local APIC
/// is in x2APIC mode.
///
/// # Errors
/// What is wrong, in words.
pub fn msr_entry(area: MsrArea, number: u32, reserved: u32, x2apic: bool) -> Result<(), Detail> {
    require!(reserved == 0, "bits 63:32 are {reserved:#x}, not 0")?;
    require!(!x2apic || number >> 8 != 8, "MSR {number:#x} belongs to the APIC, which is in x2APIC mode")?;
    let refused = match area {
        MsrArea::ExitStore => matches!(number, SMBASE),
        MsrArea::EntryLoad => {
            matches!(number, msr::FS_BASE | msr::GS_BASE | SMM_MONITOR_CTL | BIOS_UPDT_TRIG | msr::BIOS_SIGN_ID)
        }
        MsrArea::ExitLoad => {
            matches!(number, msr::FS_BASE | msr::GS_BASE | SMM_MONITOR_CTL | BIOS_UPDT_TRIG | msr::BIOS_SIGN_ID)
        }
    };
    require!(!refused, "MSR {number:#x} is one that an MSR area cannot name")
}
