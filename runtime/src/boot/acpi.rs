//! The ACPI tables: processors, interrupt routing, power management, the serial port; and what the machine does not have.
//!
//! Place in the pipeline: written into the reserved area under 1 MiB before a kernel starts (ACPI specification 6.4, "ACPI Software
//! Programming Model"). AML by the `acpi_tables` crate. Invariant: says exactly what `platform` does; in particular no VGA, no
//! keyboard controller to probe and no PCI.

use acpi_tables::Aml;
use acpi_tables::aml::{self, EISAName, IO, Interrupt, Name, Path, ResourceTemplate};
use acpi_tables::sdt::Sdt;
use twofold_arch::PhysAddr;
use twofold_mmu::PhysMap;

use super::layout;
use crate::platform::{IOAPIC_BASE, IRQ_SCI, LAPIC_BASE, acpi_pm, uart};

const OEM: [u8; 6] = *b"TWOFLD";
const OEM_TABLE: [u8; 8] = *b"TWOFOLD ";
const REVISION: u32 = 1;

/// FADT field offsets.
mod fadt {
    pub const FIRMWARE_CTRL: usize = 36;
    pub const DSDT: usize = 40;
    pub const PROFILE: usize = 45;
    pub const SCI_INT: usize = 46;
    pub const PM1A_EVT: usize = 56;
    pub const PM1A_CNT: usize = 64;
    pub const PM_TMR: usize = 76;
    pub const PM1_EVT_LEN: usize = 88;
    pub const PM1_CNT_LEN: usize = 89;
    pub const PM_TMR_LEN: usize = 91;
    pub const P_LVL2_LAT: usize = 96;
    pub const P_LVL3_LAT: usize = 98;
    pub const CENTURY: usize = 108;
    pub const BOOT_ARCH: usize = 109;
    pub const FLAGS: usize = 112;
    pub const RESET_REG: usize = 116;
    pub const RESET_VALUE: usize = 128;
    pub const MINOR: usize = 131;
    pub const X_DSDT: usize = 140;
    pub const X_PM1A_EVT: usize = 148;
    pub const X_PM1A_CNT: usize = 172;
    pub const X_PM_TMR: usize = 208;
    pub const LEN: u32 = 276;
}

/// WBINVD works, C1 works, no fixed power or sleep button, RTC wakes nothing, reset register.
const FADT_FLAGS: u32 = 1 << 0 | 1 << 2 | 1 << 4 | 1 << 5 | 1 << 6 | 1 << 10;
/// Legacy devices (the serial port), no VGA; bit 1 (8042) and bit 5 (no CMOS RTC) stay clear.
const BOOT_ARCH: u16 = 1 << 0 | 1 << 2;

/// Writes all tables; returns the address of the root pointer.
pub fn write_tables(map: &PhysMap, cpus: u32) -> u64 {
    let mut next = layout::ACPI + 0x40;
    let mut place = |table: &[u8], align: u64| {
        let at = next.next_multiple_of(align);
        map.write(PhysAddr(at), table);
        next = at + table.len() as u64;
        debug_assert!(next <= layout::ACPI_END);
        at
    };
    let facs = place(&facs(), 64);
    let dsdt = place(dsdt().as_slice(), 16);
    let fadt = place(fadt(facs, dsdt).as_slice(), 16);
    let madt = place(madt(cpus).as_slice(), 16);
    let mut xsdt = sdt(*b"XSDT", 36, 1);
    [fadt, madt].iter().for_each(|at| xsdt.append_slice(&at.to_le_bytes()));
    let xsdt = place(xsdt.as_slice(), 16);
    let mut rsdp = Vec::new();
    acpi_tables::rsdp::Rsdp::new(OEM, xsdt).to_aml_bytes(&mut rsdp);
    map.write(PhysAddr(layout::ACPI), &rsdp);
    layout::ACPI
}

fn sdt(signature: [u8; 4], len: u32, revision: u8) -> Sdt {
    Sdt::new(signature, len, revision, OEM, OEM_TABLE, REVISION)
}

fn facs() -> [u8; 64] {
    let mut facs = [0; 64];
    facs[..4].copy_from_slice(b"FACS");
    facs[4] = 64;
    facs[32] = 2;
    facs
}

/// A generic address of an I/O port block of `bytes`.
fn io_address(port: u16, bytes: u8, access: u8) -> [u8; 12] {
    let mut gas = [0; 12];
    gas[0] = 1;
    gas[1] = bytes * 8;
    gas[3] = access;
    gas[4..6].copy_from_slice(&port.to_le_bytes());
    gas
}

fn fadt(facs: u64, dsdt: u64) -> Sdt {
    let mut t = sdt(*b"FACP", fadt::LEN, 6);
    t.write_u32(fadt::FIRMWARE_CTRL, facs as u32);
    t.write_u32(fadt::DSDT, dsdt as u32);
    t.write_u8(fadt::PROFILE, 4); // enterprise server: nothing to suspend for
    t.write_u16(fadt::SCI_INT, u16::from(IRQ_SCI));
    // No SMI command port: the machine is in ACPI mode and stays there.
    t.write_u32(fadt::PM1A_EVT, u32::from(acpi_pm::PM1_EVENT));
    t.write_u32(fadt::PM1A_CNT, u32::from(acpi_pm::PM1_CONTROL));
    t.write_u32(fadt::PM_TMR, u32::from(acpi_pm::PM_TIMER));
    t.write_u8(fadt::PM1_EVT_LEN, 4);
    t.write_u8(fadt::PM1_CNT_LEN, 2);
    t.write_u8(fadt::PM_TMR_LEN, 4);
    // Latencies that say there is neither C2 nor C3.
    t.write_u16(fadt::P_LVL2_LAT, 0xfff);
    t.write_u16(fadt::P_LVL3_LAT, 0xfff);
    t.write_u8(fadt::CENTURY, 0x32);
    t.write_u16(fadt::BOOT_ARCH, BOOT_ARCH);
    t.write_u32(fadt::FLAGS, FADT_FLAGS);
    t.write_bytes(fadt::RESET_REG, &io_address(acpi_pm::RESET_PORT, 1, 1));
    t.write_u8(fadt::RESET_VALUE, acpi_pm::RESET_VALUE);
    t.write_u8(fadt::MINOR, 4);
    t.write_u64(fadt::X_DSDT, dsdt);
    t.write_bytes(fadt::X_PM1A_EVT, &io_address(acpi_pm::PM1_EVENT, 4, 2));
    t.write_bytes(fadt::X_PM1A_CNT, &io_address(acpi_pm::PM1_CONTROL, 2, 2));
    t.write_bytes(fadt::X_PM_TMR, &io_address(acpi_pm::PM_TIMER, 4, 3));
    t
}

fn madt(cpus: u32) -> Sdt {
    let mut t = sdt(*b"APIC", 44, 5);
    t.write_u32(36, LAPIC_BASE as u32);
    t.write_u32(40, 1); // there are 8259s, too
    for id in 0..cpus.clamp(1, crate::config::MAX_CPUS) as u8 {
        t.append_slice(&[0, 8, id, id, 1, 0, 0, 0]);
    }
    let base = (IOAPIC_BASE as u32).to_le_bytes();
    t.append_slice(&[1, 12, 0, 0, base[0], base[1], base[2], base[3], 0, 0, 0, 0]);
    // ISA line 0 is pin 2; the SCI is level-triggered, active high.
    t.append_slice(&[2, 10, 0, 0, 2, 0, 0, 0, 0, 0]);
    t.append_slice(&[2, 10, 0, IRQ_SCI, IRQ_SCI, 0, 0, 0, 0x0d, 0]);
    // LINT1 of every processor is NMI.
    t.append_slice(&[4, 6, 0xff, 0, 0, 1]);
    t
}

fn dsdt() -> Sdt {
    let mut t = sdt(*b"DSDT", 36, 2);
    let s5 = (acpi_pm::SLEEP_TYPE_S5, 0u8);
    Name::new(Path::new("_S5_"), &aml::Package::new(vec![&s5.0, &s5.1, &s5.1, &s5.1])).to_aml_bytes(&mut t);
    aml::Scope::new(
        Path::new("_SB_"),
        vec![
            &aml::Device::new(
                Path::new("COM1"),
                vec![
                    &Name::new(Path::new("_HID"), &EISAName::new("PNP0501")),
                    &Name::new(Path::new("_UID"), &1u8),
                    &Name::new(
                        Path::new("_CRS"),
                        &ResourceTemplate::new(vec![
                            &IO::new(uart::COM1, uart::COM1, 1, 8),
                            &Interrupt::new(true, true, false, false, 4),
                        ]),
                    ),
                ],
            ),
            &aml::Device::new(
                Path::new("RTC_"),
                vec![
                    &Name::new(Path::new("_HID"), &EISAName::new("PNP0B00")),
                    &Name::new(
                        Path::new("_CRS"),
                        &ResourceTemplate::new(vec![
                            &IO::new(0x70, 0x70, 1, 2),
                            &Interrupt::new(true, true, false, false, 8),
                        ]),
                    ),
                ],
            ),
        ],
    )
    .to_aml_bytes(&mut t);
    t.update_checksum();
    t
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use twofold_mmu::{GuestRam, LegacyHole};

    fn read(map: &PhysMap, at: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        map.read(PhysAddr(at), &mut bytes);
        bytes
    }
    fn sum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0, |a, b| a.wrapping_add(*b))
    }
    fn quad(bytes: &[u8], at: usize) -> u64 {
        u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
    }
    fn table(map: &PhysMap, at: u64) -> Vec<u8> {
        let len = u32::from_le_bytes(read(map, at + 4, 4).try_into().unwrap());
        let bytes = read(map, at, len as usize);
        assert_eq!(sum(&bytes), 0, "checksum of {:?}", String::from_utf8_lossy(&bytes[..4]));
        bytes
    }

    #[test]
    fn the_tables_hang_together() {
        let map = PhysMap::new(Arc::new(GuestRam::new(4 << 20).unwrap()), LegacyHole::Unmapped);
        for cpus in [1, 255] {
            let rsdp = read(&map, write_tables(&map, cpus), 36);
            assert_eq!(&rsdp[..8], b"RSD PTR ");
            assert_eq!((sum(&rsdp[..20]), sum(&rsdp)), (0, 0));
            let xsdt = table(&map, quad(&rsdp, 24));
            let fadt = table(&map, quad(&xsdt, 36));
            let madt = table(&map, quad(&xsdt, 44));
            assert_eq!((&fadt[..4], &madt[..4]), (&b"FACP"[..], &b"APIC"[..]));
            assert_eq!(fadt.len(), 276);
            let dsdt = table(&map, quad(&fadt, super::fadt::X_DSDT));
            assert_eq!(&dsdt[..4], b"DSDT");
            let facs = u64::from(u32::from_le_bytes(fadt[36..40].try_into().unwrap()));
            assert_eq!(facs % 64, 0);
            assert_eq!(read(&map, facs, 4), b"FACS");
            assert_eq!(madt.iter().skip(44).count(), 8 * cpus as usize + 12 + 10 + 10 + 6);
        }
    }

    #[test]
    fn s5_is_where_the_platform_has_it() {
        let bytes = dsdt().as_slice().to_vec();
        let at = bytes.windows(4).position(|w| w == b"_S5_").unwrap();
        // Package of four, first element a byte constant.
        assert_eq!(bytes[at + 4], 0x12);
        assert_eq!(bytes[at + 6], 4);
        assert_eq!(bytes[at + 7..at + 9], [0x0a, acpi_pm::SLEEP_TYPE_S5]);
    }
}
