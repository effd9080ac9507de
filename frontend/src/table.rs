//! The instruction table: a row per instruction says what must hold before it and which emitter writes its ops.
//!
//! Place: between the decoder and the emitters. The families (one file each) list their rows; [`lookup`] finds a row by
//! iced's `Code`, a row for one `Code` before a row for its whole `Mnemonic`. [`check`] does the checks in the SDM's
//! order: #UD (feature, mode; the decoder has already refused LOCK where it is not allowed, and encodings that do not
//! exist in the code size), then #NM, then the CPL.

use std::sync::LazyLock;

use iced_x86::{Code, CpuidFeature, EncodingKind, Mnemonic};
use twofold_arch::cpuid::{Feature, Features};
use twofold_arch::{Exception, TbFlags};

use crate::translator::Translator;

/// Writes the ops of the instruction that the translator stands at.
pub type Emit = fn(&mut Translator<'_>);

/// What must hold before an instruction, beside its feature.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Need(pub u16);

impl Need {
    /// Nothing.
    pub const NONE: Need = Need(0);
    /// CPL 0, else #GP(0).
    pub const CPL0: Need = Need(1);
    /// Protected mode (not virtual-8086), else #UD.
    pub const PROTECTED: Need = Need(2);
    /// SSE state usable: #UD for CR0.EM or CR4.OSFXSR = 0, then #NM for CR0.TS.
    pub const SSE: Need = Need(4);
    /// MMX usable: #UD for CR0.EM, then #NM for CR0.TS.
    pub const MMX: Need = Need(8);
    /// x87 usable: #NM for CR0.EM or CR0.TS.
    pub const X87: Need = Need(16);
    /// WAIT: #NM for CR0.MP and CR0.TS.
    pub const WAIT: Need = Need(32);
    /// 64-bit mode, else #UD.
    pub const BITS64: Need = Need(64);
    /// #NM for CR0.TS or CR0.EM as FXSAVE and FXRSTOR have it.
    pub const FXSR: Need = Need(128);
    /// #NM for CR0.TS alone (XSAVE and its kin).
    pub const TS: Need = Need(256);
    /// AVX state usable: #UD outside protected mode and without CR4.OSXSAVE and XCR0's SSE and AVX bits, then #NM for CR0.TS.
    pub const AVX: Need = Need(512);

    /// Both.
    #[must_use]
    pub const fn and(self, other: Need) -> Need {
        Need(self.0 | other.0)
    }
    const fn has(self, other: Need) -> bool {
        self.0 & other.0 != 0
    }
}

/// What a row is for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Key {
    /// All forms of a mnemonic that have no row of their own; EVEX-coded forms are nobody's.
    All(Mnemonic),
    /// One form.
    One(Code),
}

/// A row of the table.
#[derive(Clone, Copy, Debug)]
pub struct Row {
    /// What it is for.
    pub key: Key,
    /// What must hold.
    pub need: Need,
    /// The features without which it is #UD.
    pub features: Features,
    /// The emitter.
    pub emit: Emit,
}

impl Row {
    /// A row for all forms of a mnemonic.
    #[must_use]
    pub const fn all(m: Mnemonic, emit: Emit) -> Row {
        Row { key: Key::All(m), need: Need::NONE, features: Features::NONE, emit }
    }
    /// A row for one form.
    #[must_use]
    pub const fn one(c: Code, emit: Emit) -> Row {
        Row { key: Key::One(c), need: Need::NONE, features: Features::NONE, emit }
    }
    /// The row with needs added.
    #[must_use]
    pub const fn need(mut self, need: Need) -> Row {
        self.need = self.need.and(need);
        self
    }
    /// The row with a feature.
    #[must_use]
    pub const fn feature(mut self, f: Feature) -> Row {
        self.features = self.features.with(f);
        self
    }
    /// A row for the VEX-coded forms of a mnemonic; the decoder's table says which feature each form belongs to.
    #[must_use]
    pub const fn vex(m: Mnemonic, emit: Emit) -> Row {
        Row::all(m, emit).need(Need::AVX)
    }
    /// Whether the row is for VEX-coded vector instructions.
    #[must_use]
    pub const fn is_vex(&self) -> bool {
        self.need.has(Need::AVX)
    }
}

/// The families' rows. A later row for the same key wins.
static FAMILIES: &[&[Row]] = &[
    crate::moves::ROWS,
    crate::arith::ROWS,
    crate::muldiv::ROWS,
    crate::shift::ROWS,
    crate::bits::ROWS,
    crate::flags::ROWS,
    crate::branch::ROWS,
    crate::stack::ROWS,
    crate::string::ROWS,
    crate::segments::ROWS,
    crate::system::ROWS,
    crate::vmx::ROWS,
    crate::x87::ROWS,
    crate::mmx::ROWS,
    crate::mmx::ROWS_MOVES,
    crate::mmx::ROWS_CONVERT,
    crate::sse::moves::ROWS,
    crate::sse::moves::ROWS_ONE,
    crate::sse::moves::ROWS_VEX,
    crate::sse::int::ROWS,
    crate::sse::int::ROWS_PLAIN,
    crate::sse::float::ROWS,
    crate::sse::float::ROWS_ONE,
    crate::sse::convert::ROWS,
    crate::sse::convert::ROWS_GPR,
    crate::sse::shuffle::ROWS,
    crate::sse::shuffle::ROWS_PLAIN,
    crate::sse::string::ROWS,
    crate::sse::crypto::ROWS,
    crate::sse::state::ROWS,
    crate::avx::ROWS,
    crate::avx::arith::ROWS,
    crate::avx::permute::ROWS,
    crate::avx::permute::ROWS_IN_LANE,
    crate::avx::memory::ROWS,
];

struct Table {
    rows: Vec<Row>,
    /// By `Code`: index in `rows` plus 1, or 0.
    index: Box<[u16]>,
}

static TABLE: LazyLock<Table> = LazyLock::new(|| {
    let mut rows: Vec<Row> = FAMILIES.iter().flat_map(|f| f.iter().copied()).collect();
    let mnemonics = Mnemonic::values().len();
    let mut by_mnemonic = vec![0u16; mnemonics];
    for (i, row) in rows.iter().enumerate() {
        if let Key::All(m) = row.key {
            by_mnemonic[m as usize] = i as u16 + 1;
        }
    }
    let mut index: Box<[u16]> = Code::values().map(|_| 0).collect();
    for c in Code::values() {
        let n = by_mnemonic[c.mnemonic() as usize];
        let Some(row) = usize::from(n).checked_sub(1).map(|i| rows[i]) else { continue };
        let Some(features) = features_of(c, &row) else { continue };
        index[c as usize] = if features == row.features {
            n
        } else {
            // Forms of one mnemonic belong to different features: a row for each form.
            rows.push(Row { features, ..row });
            rows.len() as u16
        };
    }
    for (i, row) in rows.iter_mut().enumerate() {
        if let Key::One(c) = row.key {
            row.features = features_of(c, row).unwrap_or(row.features);
            index[c as usize] = i as u16 + 1;
        }
    }
    Table { rows, index }
});

/// The features a form needs: those of its row and those that the decoder's table knows. `None` for a form that twofold
/// does not have.
fn features_of(c: Code, row: &Row) -> Option<Features> {
    match c.op_code().encoding() {
        EncodingKind::Legacy | EncodingKind::D3NOW if !row.is_vex() => {}
        EncodingKind::VEX => {}
        _ => return None,
    }
    // Without their feature these are other instructions: BSF and BSR, and prefetches that do nothing.
    if matches!(c.mnemonic(), Mnemonic::Tzcnt | Mnemonic::Lzcnt | Mnemonic::Prefetchw | Mnemonic::Prefetchwt1) {
        return Some(row.features);
    }
    c.cpuid_features().iter().try_fold(row.features, |set, &f| match feature(f) {
        Some(f) => Some(set.with(f)),
        None if row.is_vex() => None,
        None => Some(set),
    })
}

/// The decoder's name for a feature as ours.
fn feature(f: CpuidFeature) -> Option<Feature> {
    Some(match f {
        CpuidFeature::ADX => Feature::Adx,
        CpuidFeature::AES => Feature::Aes,
        CpuidFeature::AVX => Feature::Avx,
        CpuidFeature::AVX2 => Feature::Avx2,
        CpuidFeature::BMI1 => Feature::Bmi1,
        CpuidFeature::BMI2 => Feature::Bmi2,
        CpuidFeature::CLFLUSHOPT => Feature::Clflushopt,
        CpuidFeature::CLFSH => Feature::Clflush,
        CpuidFeature::CLWB => Feature::Clwb,
        CpuidFeature::CMOV => Feature::Cmov,
        CpuidFeature::CMPXCHG16B => Feature::Cx16,
        CpuidFeature::CX8 => Feature::Cx8,
        CpuidFeature::F16C => Feature::F16c,
        CpuidFeature::FMA => Feature::Fma,
        CpuidFeature::FPU => Feature::X87,
        CpuidFeature::FSGSBASE => Feature::Fsgsbase,
        CpuidFeature::FXSR => Feature::Fxsr,
        CpuidFeature::GFNI => Feature::Gfni,
        CpuidFeature::INVPCID => Feature::Invpcid,
        CpuidFeature::MMX => Feature::Mmx,
        CpuidFeature::MONITOR => Feature::Monitor,
        CpuidFeature::MOVBE => Feature::Movbe,
        CpuidFeature::MOVDIR64B => Feature::Movdir64b,
        CpuidFeature::MOVDIRI => Feature::Movdiri,
        CpuidFeature::MSR => Feature::Msr,
        CpuidFeature::PCLMULQDQ => Feature::Pclmulqdq,
        CpuidFeature::PKU => Feature::Pku,
        CpuidFeature::POPCNT => Feature::Popcnt,
        CpuidFeature::RDPID => Feature::Rdpid,
        CpuidFeature::RDRAND => Feature::Rdrand,
        CpuidFeature::RDSEED => Feature::Rdseed,
        CpuidFeature::RDTSCP => Feature::Rdtscp,
        CpuidFeature::SEP => Feature::Sysenter,
        CpuidFeature::SERIALIZE => Feature::Serialize,
        CpuidFeature::SHA => Feature::Sha,
        CpuidFeature::SMAP => Feature::Smap,
        CpuidFeature::SSE => Feature::Sse,
        CpuidFeature::SSE2 => Feature::Sse2,
        CpuidFeature::SSE3 => Feature::Sse3,
        CpuidFeature::SSE4_1 => Feature::Sse41,
        CpuidFeature::SSE4_2 => Feature::Sse42,
        CpuidFeature::SSSE3 => Feature::Ssse3,
        CpuidFeature::SYSCALL => Feature::Syscall,
        CpuidFeature::TSC => Feature::Tsc,
        CpuidFeature::VAES => Feature::Vaes,
        CpuidFeature::VMX | CpuidFeature::INVEPT | CpuidFeature::INVVPID => Feature::Vmx,
        CpuidFeature::VPCLMULQDQ => Feature::Vpclmulqdq,
        CpuidFeature::WAITPKG => Feature::Waitpkg,
        CpuidFeature::XSAVE => Feature::Xsave,
        CpuidFeature::XSAVEC => Feature::Xsavec,
        CpuidFeature::XSAVEOPT => Feature::Xsaveopt,
        CpuidFeature::XSAVES => Feature::Xsaves,
        _ => return None,
    })
}

/// The row of an instruction form; `None` when twofold does not have it.
#[must_use]
pub fn lookup(code: Code) -> Option<&'static Row> {
    let t = &*TABLE;
    match t.index[code as usize] {
        0 => None,
        n => Some(&t.rows[usize::from(n) - 1]),
    }
}

/// The checks of a row, in the SDM's priority order.
///
/// # Errors
/// The exception the instruction raises whatever its operands hold.
pub fn check(row: &Row, t: &Translator<'_>) -> Result<(), Exception> {
    if row.features == Features::NONE && row.need == Need::NONE {
        return Ok(());
    }
    let Row { need, features, .. } = *row;
    let flags = t.flags;
    if !t.features.has_all(features)
        || need.has(Need::PROTECTED) && !flags.has(TbFlags::PROTECTED)
        || need.has(Need::BITS64) && !flags.is64()
        || need.has(Need::SSE) && flags.has(TbFlags::SSE_UD)
        || need.has(Need::MMX) && flags.has(TbFlags::MMX_UD)
        || need.has(Need::AVX) && !flags.has(TbFlags::AVX | TbFlags::PROTECTED)
    {
        return Err(Exception::UD);
    }
    if need.has(Need(Need::SSE.0 | Need::MMX.0 | Need::TS.0 | Need::AVX.0)) && flags.has(TbFlags::TS)
        || need.has(Need(Need::X87.0 | Need::FXSR.0)) && flags.has(TbFlags::X87_NM)
        || need.has(Need::WAIT) && flags.has(TbFlags::WAIT_NM)
    {
        return Err(Exception::NM);
    }
    if need.has(Need::CPL0) && flags.cpl() != 0 {
        return Err(Exception::GP0);
    }
    Ok(())
}
