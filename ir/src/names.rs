//! Names of the fields of the guest state, both ways, for the text form.
//!
//! A place inside a field is `name+bytes`; a place without a name is `@offset`.

use core::mem::offset_of;
use std::sync::OnceLock;

use twofold_arch::{CpuState, Gpr, Loc, SegReg};

/// A named field.
struct Field {
    start: u16,
    size: u16,
    name: String,
}

/// All named fields by offset.
fn fields() -> &'static [Field] {
    static FIELDS: OnceLock<Vec<Field>> = OnceLock::new();
    FIELDS.get_or_init(|| {
        let mut all = Vec::new();
        let mut add = |loc: Loc, size: u16, name: &str| all.push(Field { start: loc.0, size, name: name.into() });
        for (n, name) in Gpr::NAMES.iter().enumerate() {
            add(Loc::gpr(n as u8), 8, name);
        }
        for n in 0..16 {
            add(Loc::xmm(n), 16, &format!("xmm{n}"));
            add(Loc::ymm_high(n), 16, &format!("ymm{n}.high"));
        }
        for n in 0..8 {
            add(Loc::fpr(n), 16, &format!("fpr{n}"));
            let segment = SegReg::NAMES[n as usize];
            add(Loc::seg_base(n), 8, &format!("{segment}.base"));
            add(Loc::seg_selector(n), 2, &format!("{segment}.selector"));
        }
        for n in 0..4 {
            add(Loc::scratch(n), 32, &format!("scratch{n}"));
        }
        macro_rules! plain {
            ($($field:ident $size:literal)*) => { $(add(Loc(offset_of!(CpuState, $field) as u16), $size, stringify!($field));)* };
        }
        plain! {
            rip_base 8 cc_dst 8 cc_src 8 cc_src2 8 cc_op 4 rip 8 rflags_sys 8 mxcsr 4 fcw 2 fsw 2 ftw 2 fop 2 fip 8 fdp 8 fcs 2
            fds 2 cr0 8 cr2 8 cr3 8 cr4 8 cr8 8 xcr0 8 efer 8 xss 8 pkru 4 cpl 4 shadow 4
        }
        add(Loc::KERNEL_GS_BASE, 8, "kernel_gs_base");
        all.sort_by_key(|f| f.start);
        all
    })
}

/// The name of a place.
#[must_use]
pub fn name(loc: Loc) -> String {
    let all = fields();
    let field = all.partition_point(|f| f.start <= loc.0).checked_sub(1).map(|i| &all[i]);
    match field.map(|f| (f, loc.0 - f.start)) {
        Some((f, 0)) => f.name.clone(),
        Some((f, off)) if off < f.size => format!("{}+{off}", f.name),
        _ => format!("@{:#x}", loc.0),
    }
}

/// The place a name stands for.
#[must_use]
pub fn loc(name: &str) -> Option<Loc> {
    if let Some(offset) = name.strip_prefix("@0x") {
        return u16::from_str_radix(offset, 16).ok().map(Loc);
    }
    let (field, off) = match name.split_once('+') {
        Some((field, off)) => (field, off.parse().ok()?),
        None => (name, 0),
    };
    fields().iter().find(|f| f.name == field).and_then(|f| f.start.checked_add(off)).map(Loc)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_place_has_a_name_that_means_it() {
        for n in 0..size_of::<CpuState>() as u16 {
            assert_eq!(loc(&name(Loc(n))), Some(Loc(n)), "{}", name(Loc(n)));
        }
        assert_eq!(name(Loc::gpr(4)), "rsp");
        assert_eq!(name(Loc(Loc::gpr(0).0 + 1)), "rax+1");
        assert_eq!(name(Loc::seg_base(4)), "fs.base");
        assert_eq!(name(Loc::ymm_high(3)), "ymm3.high");
        assert_eq!(loc("nothing"), None);
        assert_eq!(loc("rax+x"), None);
    }
}
