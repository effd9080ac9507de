//! The demo's L2 guests: their programs, their page tables, and the tables of VMCS fields that L1 writes for them.
//!
//! A guest reads one linear address and says so by VMCALL. There is one in each paging mode, and one each in real and in
//! unpaged protected mode. What VMCS fields hold is cut into tables, so that L1 can combine a mode with EPT, VPID or neither.

use super::Memory;
use super::layout::{self, l1, selector};
use super::tables::{Paging, Tables};
use iced_x86::IcedError;
use iced_x86::code_asm::*;
use twofold_arch::control::{cr0, cr4};
use twofold_arch::paging::{P, RW};
use twofold_arch::vmx::control::{entry, exit, proc, proc2};
use twofold_arch::vmx::{Field, NO_VMCS};

/// The frame that guests find at their probe holds this.
pub const SEEN: u32 = 0x1212_1212;
/// The one after it, which EPT does not map at first, this.
pub const SEEN_NEXT: u32 = 0x3434_3434;
/// The VPID of guests that have one.
pub const VPID: u16 = 1;

/// The programs, by their offsets from where the programs of one operand size begin.
pub mod program {
    /// Reads the probe.
    pub const READ: u32 = 0;
    /// MOV to CR3 of what is there, then reads the probe.
    pub const MOV_CR3: u32 = 0x10;
    /// INVLPG of the probe, then reads it.
    pub const INVLPG: u32 = 0x20;
    /// Reads the page after the probe.
    pub const READ_NEXT: u32 = 0x30;
    /// Bytes for the programs of one operand size.
    pub const SIZE: u32 = 0x40;
}

/// The mode of a guest.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Mode {
    /// CR0.PE = 0.
    Real,
    /// CR0.PE = 1, CR0.PG = 0.
    Flat,
    /// A paging mode.
    Paged(Paging),
}

impl Mode {
    /// All of them.
    pub const ALL: [Mode; 6] = [
        Mode::Real,
        Mode::Flat,
        Mode::Paged(Paging::Bits32),
        Mode::Paged(Paging::Pae),
        Mode::Paged(Paging::Four),
        Mode::Paged(Paging::Five),
    ];
    /// What the table calls it.
    pub fn name(self) -> &'static str {
        match self {
            Mode::Real => "real",
            Mode::Flat => "no paging",
            Mode::Paged(Paging::Bits32) => "32-bit",
            Mode::Paged(Paging::Pae) => "PAE",
            Mode::Paged(Paging::Four) => "4-level",
            Mode::Paged(Paging::Five) => "5-level",
        }
    }
    fn bits(self) -> u32 {
        match self {
            Mode::Real => 16,
            Mode::Paged(paging) if paging.is_64_bit() => 64,
            _ => 32,
        }
    }
    /// Where its programs begin.
    fn programs(self) -> u32 {
        layout::L2 + program::SIZE * (self.bits().trailing_zeros() - 4)
    }
    /// RIP of a program: real mode's code segment begins at the first.
    pub fn rip(self, program: u32) -> u32 {
        if self == Mode::Real { program } else { self.programs() + program }
    }
    /// The linear address that the guest reads.
    pub fn probe(self) -> u64 {
        match self {
            Mode::Real | Mode::Flat => layout::L2_FRAMES.into(),
            Mode::Paged(Paging::Bits32 | Paging::Pae) => 0xc000_0000,
            Mode::Paged(Paging::Four) => 0x0000_7fff_ff00_0000,
            Mode::Paged(Paging::Five) => 0x00ff_ffff_ff00_0000,
        }
    }
}

/// One guest.
pub struct Guest {
    pub mode: Mode,
    /// Address of the fields of its mode.
    pub fields: u32,
    /// Address of the fields that it needs besides under EPT.
    pub fields_with_ept: u32,
    /// Where its page tables begin and end.
    pub tables: [u32; 2],
}

/// How a guest's addresses are translated besides its own paging.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct With {
    pub ept: bool,
    pub vpid: bool,
}

/// All guests.
pub struct Guests {
    pub guests: Vec<Guest>,
    /// Address of the fields that are the same for all.
    pub common: u32,
    /// Addresses of the fields for EPT and VPID.
    pub with: Vec<(With, u32)>,
    pub eptp: u64,
    /// Where EPT's tables begin and end.
    pub ept_tables: [u32; 2],
    /// Address of the EPT entry for the frame after the probe's, and what it is to be.
    pub ept_next: (u32, u64),
}

/// Writes tables of fields: 16 bytes each, the encoding, the address of the capabilities to adjust the value by or 0, and
/// the value; all ones end a table.
struct FieldTables<'m> {
    memory: &'m mut Memory,
    next: u32,
}

impl FieldTables<'_> {
    fn put(&mut self, rows: &[(Field, u32, u64)]) -> Result<u32, String> {
        let start = self.next;
        for &(field, capability, value) in rows {
            self.memory.put32(self.next, &[field.encoding(), capability])?;
            self.memory.put64(self.next + 8, &[value])?;
            self.next += 16;
        }
        self.memory.put32(self.next, &[u32::MAX])?;
        self.next += 16;
        if self.next > layout::L1_VARIABLES { Err("the VMCS fields do not fit".into()) } else { Ok(start) }
    }
}

/// Addresses of the capabilities of each word of controls.
const PIN: u32 = l1::CAPABILITIES;
const PROC: u32 = l1::CAPABILITIES + 8;
const EXIT: u32 = l1::CAPABILITIES + 16;
const ENTRY: u32 = l1::CAPABILITIES + 24;
const PROC2: u32 = l1::CAPABILITIES + 32;

impl Guests {
    /// Makes all guests.
    pub fn new(memory: &mut Memory, tables: &mut Tables) -> Result<Self, String> {
        for bits in [16, 32, 64] {
            put_programs(memory, bits)?;
        }
        memory.put32(layout::L2_FRAMES, &[SEEN])?;
        memory.put32(layout::L2_FRAMES + 0x1000, &[SEEN_NEXT])?;
        memory.put64(l1::VMXON_POINTER, &[layout::VMXON.into(), layout::VMCS.into()])?;
        let start = tables.next();
        let (eptp, pages) = tables.ept(memory)?;
        let ept_tables = [start, tables.next()];
        let next = pages + (layout::L2_FRAMES + 0x1000) / 0x1000 * 8;
        let mapped = u64::from(layout::L2_FRAMES + 0x1000) | 0x37;
        memory.put64(next, &[0])?;
        let mut roots = Vec::new();
        for mode in Mode::ALL {
            let start = tables.next();
            let mut root = 0;
            if let Mode::Paged(paging) = mode {
                root = tables.space(memory, paging)?;
                for page in [0, 0x1000] {
                    let frame = u64::from(layout::L2_FRAMES) + page;
                    tables.set(memory, root, paging, mode.probe() + page, 12, frame | P | RW)?;
                }
            }
            roots.push((mode, root, [start, tables.next()]));
        }
        let pdptes =
            |memory: &Memory, root: u32| -> [u64; 4] { core::array::from_fn(|i| memory.get64(root + 8 * i as u32)) };
        let mut guests = Vec::new();
        let mut fields = FieldTables { memory, next: layout::FIELDS };
        let common = fields.put(&common_fields())?;
        for (mode, root, tables) in roots {
            let address = fields.put(&mode_fields(mode, root))?;
            let mut more = Vec::new();
            if mode == Mode::Paged(Paging::Pae) {
                let entries = pdptes(fields.memory, root);
                more.extend(entries.iter().enumerate().map(|(i, e)| (Field::guest_pdpte(i), 0, *e)));
            }
            let fields_with_ept = fields.put(&more)?;
            guests.push(Guest { mode, fields: address, fields_with_ept, tables });
        }
        let mut with = Vec::new();
        for (ept, vpid) in [(false, false), (false, true), (true, false), (true, true)] {
            with.push((With { ept, vpid }, fields.put(&translation_fields(With { ept, vpid }, eptp))?));
        }
        Ok(Self { guests, common, with, eptp, ept_tables, ept_next: (next, mapped) })
    }

    /// The guest in `mode`.
    pub fn guest(&self, mode: Mode) -> Option<&Guest> {
        self.guests.iter().find(|g| g.mode == mode)
    }
    /// Addresses of the tables of fields of a row.
    pub fn fields(&self, guest: &Guest, with: With) -> Vec<u32> {
        let mut all = vec![self.common, guest.fields];
        all.extend(self.with.iter().filter(|(w, _)| *w == with).map(|(_, at)| *at));
        if with.ept {
            all.push(guest.fields_with_ept);
        }
        all
    }
}

/// The host state, but what L1 takes from its own registers.
fn common_fields() -> Vec<(Field, u32, u64)> {
    use Field::*;
    let data = u64::from(selector::DATA);
    vec![
        (VmcsLinkPointer, 0, NO_VMCS),
        // Any exception ends the row.
        (ExceptionBitmap, 0, 0xffff_ffff),
        (ExitControls, EXIT, exit::HOST_ADDRESS_SPACE_SIZE.into()),
        (HostCsSelector, 0, selector::CODE64.into()),
        (HostSsSelector, 0, data),
        (HostDsSelector, 0, data),
        (HostEsSelector, 0, data),
        // Not null, and otherwise of no use here.
        (HostTrSelector, 0, data),
        (HostGdtrBase, 0, layout::GDT.into()),
        (HostIdtrBase, 0, (layout::IDTS + 4 * 0x1000).into()),
    ]
}

fn mode_fields(mode: Mode, root: u32) -> Vec<(Field, u32, u64)> {
    use Field::*;
    let wide = mode.bits() == 64;
    let (cr0_bits, cr4_bits) = match mode {
        Mode::Real => (0, 0),
        Mode::Flat => (cr0::PE, 0),
        Mode::Paged(paging) => {
            let bits = match paging {
                Paging::Bits32 => cr4::PSE,
                Paging::Pae | Paging::Four => cr4::PAE,
                Paging::Five => cr4::PAE | cr4::LA57,
            };
            (cr0::PE | cr0::PG | cr0::WP, bits | cr4::PGE)
        }
    };
    let mut rows = vec![
        (EntryControls, ENTRY, if wide { entry::IA32E_MODE_GUEST.into() } else { 0 }),
        (GuestCr0, 0, cr0_bits | cr0::NE | cr0::ET),
        (GuestCr3, 0, root.into()),
        (GuestCr4, 0, cr4_bits | cr4::VMXE),
        (GuestDr7, 0, 0x400),
        (GuestRip, 0, mode.rip(program::READ).into()),
        (GuestRsp, 0, 0),
        (GuestRflags, 0, 2),
        (GuestInterruptibility, 0, 0),
        (GuestActivity, 0, 0),
        (GuestPendingDebug, 0, 0),
        (GuestGdtrLimit, 0, 0),
        (GuestIdtrLimit, 0, 0),
    ];
    // Present, accessed; code is readable, data writable. G, then D or L.
    let (flat, code_size) = (0xffff_ffff, if wide { 0xa000 } else { 0xc000 });
    for n in 0..6 {
        let code = n == 1;
        let rights = if code { 0x9b } else { 0x93 };
        let (limit, rights) = match mode {
            // Limits beyond 64 KiB, as real mode keeps them from protected mode.
            Mode::Real if code => (0xffff, rights),
            _ if code => (flat, rights | code_size),
            _ => (flat, rights | 0xc000),
        };
        let base = if code && mode == Mode::Real { mode.programs().into() } else { 0 };
        let selector = if mode == Mode::Real { 0 } else { u64::from(selector::DATA) };
        rows.extend([
            (Field::guest_selector(n), 0, selector),
            (Field::guest_base(n), 0, base),
            (Field::guest_limit(n), 0, limit),
            (Field::guest_access_rights(n), 0, rights),
        ]);
    }
    // No LDT; a busy TSS.
    for (n, selector, limit, rights) in [(6, 0, 0, 0x1_0000), (7, u64::from(selector::DATA), 0x67, 0x8b)] {
        rows.extend([
            (Field::guest_selector(n), 0, selector),
            (Field::guest_base(n), 0, 0),
            (Field::guest_limit(n), 0, limit),
            (Field::guest_access_rights(n), 0, rights),
        ]);
    }
    rows
}

fn translation_fields(with: With, eptp: u64) -> Vec<(Field, u32, u64)> {
    let mut second = 0;
    if with.ept {
        second |= proc2::EPT | proc2::UNRESTRICTED_GUEST;
    }
    if with.vpid {
        second |= proc2::VPID;
    }
    let first = if second == 0 { 0 } else { proc::SECONDARY };
    let mut rows = vec![(Field::PinControls, PIN, 0), (Field::ProcControls, PROC, first.into())];
    if second != 0 {
        rows.push((Field::Proc2Controls, PROC2, second.into()));
    }
    if with.ept {
        rows.push((Field::Eptp, 0, eptp));
    }
    if with.vpid {
        rows.push((Field::Vpid, 0, VPID.into()));
    }
    rows
}

/// The programs in code of one operand size; EBX or RBX is the probe, EAX what was read.
fn put_programs(memory: &mut Memory, bits: u32) -> Result<(), String> {
    let base = layout::L2 + program::SIZE * (bits.trailing_zeros() - 4);
    for offset in [program::READ, program::MOV_CR3, program::INVLPG, program::READ_NEXT] {
        let bytes = assemble(bits, offset, base + offset).map_err(|e| e.to_string())?;
        if bytes.len() > 0x10 {
            return Err(format!("{} bytes of a guest's program do not fit", bytes.len()));
        }
        memory.put(base + offset, &bytes)?;
    }
    Ok(())
}

fn assemble(bits: u32, offset: u32, at: u32) -> Result<Vec<u8>, IcedError> {
    let mut a = CodeAssembler::new(bits)?;
    let wide = bits == 64;
    match offset {
        program::MOV_CR3 if wide => {
            a.mov(rax, cr3)?;
            a.mov(cr3, rax)?;
        }
        program::MOV_CR3 => {
            a.mov(eax, cr3)?;
            a.mov(cr3, eax)?;
        }
        program::INVLPG if wide => a.invlpg(byte_ptr(rbx))?,
        program::INVLPG => a.invlpg(byte_ptr(ebx))?,
        _ => {}
    }
    let further = if offset == program::READ_NEXT { 0x1000 } else { 0 };
    if wide {
        a.mov(eax, dword_ptr(rbx + further))?;
    } else {
        a.mov(eax, dword_ptr(ebx + further))?;
    }
    a.vmcall()?;
    a.assemble(at.into())
}
