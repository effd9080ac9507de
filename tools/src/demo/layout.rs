//! Where everything of the demo guest lies in guest-physical memory.
//!
//! The image is loaded at 1 MiB; real mode runs in a copy below. All of it is in the first 4 MiB, which every address
//! space of the guest maps to itself with global large pages.

/// Where the image is loaded, and its Multiboot header.
pub const IMAGE_BASE: u32 = 0x10_0000;
/// The image's size; page tables and frames are the most of it.
pub const IMAGE_SIZE: u32 = 0xc_0000;

/// Entry: 32-bit protected mode without paging, as Multiboot leaves it.
pub const ENTRY: u32 = IMAGE_BASE + 0x40;
/// The real-mode piece in the image...
pub const REAL_STORED: u32 = IMAGE_BASE + 0x1000;
/// ...and where it runs.
pub const REAL: u32 = 0x7000;
/// The most a real-mode piece may take.
pub const REAL_SIZE: u32 = 0x800;
/// LIDT's operand for the interrupt vector table.
pub const REAL_POINTER: u32 = REAL + 0x40;
/// The #DE handler.
pub const REAL_HANDLER: u32 = REAL + 0x50;
/// What runs in real mode.
pub const REAL_MAIN: u32 = REAL + 0xa0;
/// 32-bit code: prints real mode's rows, does 32-bit paging and PAE, enters 64-bit mode.
pub const MAIN32: u32 = IMAGE_BASE + 0x2000;
/// 64-bit code under 4-level paging.
pub const FOUR: u32 = IMAGE_BASE + 0x6000;
/// 32-bit code that changes CR4.LA57, which 64-bit code may not.
pub const BETWEEN: u32 = IMAGE_BASE + 0x9000;
/// 64-bit code under 5-level paging.
pub const FIVE: u32 = IMAGE_BASE + 0xa000;
/// GDT, and the pseudo-descriptors for LGDT and LIDT.
pub const GDT: u32 = IMAGE_BASE + 0xf000;
/// Pseudo-descriptors, eight bytes apart... the GDT's first, then one for each IDT.
pub const POINTERS: u32 = GDT + 0x100;
/// IDTs, one for each piece that takes faults.
pub const IDTS: u32 = IMAGE_BASE + 0x1_0000;
/// The guest's variables.
pub const VARIABLES: u32 = IMAGE_BASE + 0x1_5000;
/// Frames that the rows map.
pub const FRAMES: u32 = IMAGE_BASE + 0x1_8000;
/// Page tables, up to [`L1`].
pub const TABLES: u32 = IMAGE_BASE + 0x3_0000;
/// Stack of the 32- and 64-bit pieces, growing down.
pub const STACK: u32 = IMAGE_BASE + 0x1_8000;
/// The hypervisor L1, 64-bit code under 5-level paging, and the end.
pub const L1: u32 = IMAGE_BASE + 0xa_0000;
/// The programs of the guests L2.
pub const L2: u32 = IMAGE_BASE + 0xa_6000;
/// What L1 writes into its VMCS, table by table.
pub const FIELDS: u32 = IMAGE_BASE + 0xa_7000;
/// L1's variables.
pub const L1_VARIABLES: u32 = IMAGE_BASE + 0xa_d000;
/// The VMXON region.
pub const VMXON: u32 = IMAGE_BASE + 0xa_e000;
/// The VMCS.
pub const VMCS: u32 = IMAGE_BASE + 0xa_f000;
/// Strings.
pub const TEXT: u32 = IMAGE_BASE + 0xb_0000;
/// Where they end.
pub const TEXT_END: u32 = IMAGE_BASE + 0xb_5000;
/// The frame that L2's tables map, and one that EPT does not map at first.
pub const L2_FRAMES: u32 = IMAGE_BASE + 0xb_5000;

/// Selectors of the GDT's segments.
pub mod selector {
    /// 32-bit code, flat.
    pub const CODE32: u16 = 0x08;
    /// Data, flat.
    pub const DATA: u16 = 0x10;
    /// 16-bit code, base 0, 64 KiB: the way to real mode.
    pub const CODE16: u16 = 0x18;
    /// Data, base 0, 64 KiB.
    pub const DATA16: u16 = 0x20;
    /// 64-bit code.
    pub const CODE64: u16 = 0x28;
}

/// The guest's variables, eight bytes each.
pub mod var {
    use super::VARIABLES;

    /// Vector of the last fault.
    pub const VECTOR: u32 = VARIABLES;
    /// Its error code.
    pub const ERROR: u32 = VARIABLES + 0x08;
    /// CR2 as its handler read it.
    pub const CR2: u32 = VARIABLES + 0x10;
    /// Faults in this row.
    pub const COUNT: u32 = VARIABLES + 0x18;
    /// Faults in all.
    pub const TOTAL: u32 = VARIABLES + 0x20;
    /// Where a handler resumes; 0: at the instruction again, after it has repaired a paging entry.
    pub const RESUME: u32 = VARIABLES + 0x28;
    /// Address of the entry that the handler repairs.
    pub const FIX_AT: u32 = VARIABLES + 0x30;
    /// What it writes there.
    pub const FIX: u32 = VARIABLES + 0x38;
    /// What an access read in the end.
    pub const VALUE: u32 = VARIABLES + 0x40;
    /// Not zero: this row is not as expected.
    pub const ROW_WRONG: u32 = VARIABLES + 0x48;
    /// Rows that were not.
    pub const WRONG: u32 = VARIABLES + 0x50;
    /// CR3 of address spaces A and B of the current mode.
    pub const CR3_A: u32 = VARIABLES + 0x58;
    /// See [`CR3_A`].
    pub const CR3_B: u32 = VARIABLES + 0x60;
    /// Not zero: the processor has PCIDs.
    pub const PCID: u32 = VARIABLES + 0x68;
    /// CPUID's vendor, 12 bytes and a zero.
    pub const VENDOR: u32 = VARIABLES + 0x80;
    /// CPUID's brand string, 48 bytes and a zero.
    pub const BRAND: u32 = VARIABLES + 0x90;
}

/// L1's variables, eight bytes each.
pub mod l1 {
    use super::L1_VARIABLES;

    /// Operands of VMXON and of VMCLEAR and VMPTRLD.
    pub const VMXON_POINTER: u32 = L1_VARIABLES;
    /// See [`VMXON_POINTER`].
    pub const VMCS_POINTER: u32 = L1_VARIABLES + 0x08;
    /// Not zero: the VMCS has been launched.
    pub const LAUNCHED: u32 = L1_VARIABLES + 0x10;
    /// Not zero: the processor lacks a control that this row wants.
    pub const LACKING: u32 = L1_VARIABLES + 0x18;
    /// The linear address that L2 is to read.
    pub const L2_PROBE: u32 = L1_VARIABLES + 0x20;
    /// What it read.
    pub const VALUE: u32 = L1_VARIABLES + 0x28;
    /// Exit reason; all ones when VM entry failed.
    pub const REASON: u32 = L1_VARIABLES + 0x30;
    /// Guest-physical address of an EPT violation.
    pub const GUEST_PHYSICAL: u32 = L1_VARIABLES + 0x38;
    /// Entries with the accessed flag set since they were last counted: L1's tables, L2's, and EPT's.
    pub const WALKED: [u32; 3] = [L1_VARIABLES + 0x40, L1_VARIABLES + 0x48, L1_VARIABLES + 0x50];
    /// Where L2's tables of the current row begin and end.
    pub const L2_TABLES: u32 = L1_VARIABLES + 0x58;
    /// See [`L2_TABLES`].
    pub const L2_TABLES_END: u32 = L1_VARIABLES + 0x60;
    /// How often the row is still to be run.
    pub const PASSES: u32 = L1_VARIABLES + 0x68;
    /// Descriptor of INVVPID and INVEPT, 16 bytes.
    pub const DESCRIPTOR: u32 = L1_VARIABLES + 0x70;
    /// Capabilities: bits that must be 1, bits that may be 1, 32 bits each; pin-based, processor-based, VM-exit, VM-entry
    /// and secondary processor-based controls.
    pub const CAPABILITIES: u32 = L1_VARIABLES + 0x80;
}

/// What real mode leaves for the 32-bit code that prints it; 16-bit words.
pub mod real {
    /// How often the #DE handler ran.
    pub const FAULTS: u32 = 0x6000;
    /// The return address's IP that it found on the stack.
    pub const FAULT_IP: u32 = 0x6002;
    /// CS of the return address.
    pub const FAULT_CS: u32 = 0x6004;
    /// The words read through the two segments.
    pub const SEEN_A: u32 = 0x6006;
    /// See [`SEEN_A`].
    pub const SEEN_B: u32 = 0x6008;
    /// How often a switch of segments read the wrong one.
    pub const MISSES: u32 = 0x600a;
    /// The two bytes at the return address.
    pub const FAULT_BYTES: u32 = 0x600c;
}

/// The Multiboot header: magic, flags (addresses given), checksum, header, load, load end, bss end, entry.
pub fn multiboot_header() -> [u32; 8] {
    const MAGIC: u32 = 0x1bad_b002;
    const FLAGS: u32 = 1 << 16;
    let end = IMAGE_BASE + IMAGE_SIZE;
    [MAGIC, FLAGS, 0u32.wrapping_sub(MAGIC + FLAGS), IMAGE_BASE, IMAGE_BASE, end, end, ENTRY]
}
