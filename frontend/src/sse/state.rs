//! MXCSR and the save areas: LDMXCSR, STMXCSR, FXSAVE, FXRSTOR, XSAVE and its kin.
//!
//! Loading any of these may unmask SSE exceptions, which the block's key depends on: the block ends.

use iced_x86::Mnemonic;
use twofold_arch::cpuid::Feature;
use twofold_arch::fpu::area;
use twofold_ir::{Helper, Ty, Value};

use crate::table::{Need, Row};
use crate::translator::{Access, Translator};

/// Rows by mnemonic.
pub const ROWS: &[Row] = &[
    Row::all(Mnemonic::Ldmxcsr, ldmxcsr).feature(Feature::Sse).need(Need::SSE),
    Row::all(Mnemonic::Stmxcsr, stmxcsr).feature(Feature::Sse).need(Need::SSE),
    Row::vex(Mnemonic::Vldmxcsr, ldmxcsr),
    Row::vex(Mnemonic::Vstmxcsr, stmxcsr),
    Row::all(Mnemonic::Fxsave, |t| save(t, area::FXSAVE)).feature(Feature::Fxsr).need(Need::FXSR),
    Row::all(Mnemonic::Fxsave64, |t| save(t, area::FXSAVE | area::WIDE)).feature(Feature::Fxsr).need(Need::FXSR),
    Row::all(Mnemonic::Fxrstor, |t| restore(t, area::FXSAVE)).feature(Feature::Fxsr).need(Need::FXSR),
    Row::all(Mnemonic::Fxrstor64, |t| restore(t, area::FXSAVE | area::WIDE)).feature(Feature::Fxsr).need(Need::FXSR),
    Row::all(Mnemonic::Xsave, |t| save(t, area::XSAVE)).feature(Feature::Xsave),
    Row::all(Mnemonic::Xsave64, |t| save(t, area::XSAVE | area::WIDE)).feature(Feature::Xsave),
    Row::all(Mnemonic::Xsaveopt, |t| save(t, area::XSAVEOPT)).feature(Feature::Xsaveopt),
    Row::all(Mnemonic::Xsaveopt64, |t| save(t, area::XSAVEOPT | area::WIDE)).feature(Feature::Xsaveopt),
    Row::all(Mnemonic::Xsavec, |t| save(t, area::XSAVEC)).feature(Feature::Xsavec),
    Row::all(Mnemonic::Xsavec64, |t| save(t, area::XSAVEC | area::WIDE)).feature(Feature::Xsavec),
    Row::all(Mnemonic::Xsaves, |t| save(t, area::XSAVES)).feature(Feature::Xsaves),
    Row::all(Mnemonic::Xsaves64, |t| save(t, area::XSAVES | area::WIDE)).feature(Feature::Xsaves),
    Row::all(Mnemonic::Xrstor, |t| restore(t, area::XSAVE)).feature(Feature::Xsave),
    Row::all(Mnemonic::Xrstor64, |t| restore(t, area::XSAVE | area::WIDE)).feature(Feature::Xsave),
    Row::all(Mnemonic::Xrstors, |t| restore(t, area::XSAVES)).feature(Feature::Xsaves),
    Row::all(Mnemonic::Xrstors64, |t| restore(t, area::XSAVES | area::WIDE)).feature(Feature::Xsaves),
];

fn ldmxcsr(t: &mut Translator<'_>) {
    let v = t.load_mem(Ty::I32);
    t.call(Helper::Ldmxcsr, &[v]);
    t.end_dispatch();
}

fn stmxcsr(t: &mut Translator<'_>) {
    let v = t.call(Helper::Stmxcsr, &[]);
    let v = t.b.trunc(Ty::I32, v);
    t.store_mem(v);
}

/// The save area's linear address. Outside 64-bit code the segment is checked at the first and the last byte of the
/// legacy area.
fn area_address(t: &mut Translator<'_>, kind: u64, access: Access) -> Value {
    // Where only CPL 0 may, the helper refuses before anybody asks what the segment thinks of the address.
    if kind & area::KIND == area::XSAVES && t.flags.cpl() != 0 {
        return t.c64(0);
    }
    if !t.is64() {
        let last = t.c64(511);
        t.mem_addr_plus(last, 1, access);
    }
    t.mem_addr_unaligned(1, access)
}

/// The `form` argument of the helpers.
fn form(t: &Translator<'_>, kind: u64) -> u64 {
    if t.mem_segment() == crate::address::SS { kind | area::STACK } else { kind }
}

fn save(t: &mut Translator<'_>, kind: u64) {
    let addr = area_address(t, kind, Access::Write);
    let f = t.c64(form(t, kind));
    t.call(Helper::SaveState, &[addr, f]);
}

fn restore(t: &mut Translator<'_>, kind: u64) {
    let addr = area_address(t, kind, Access::Read);
    let f = t.c64(form(t, kind));
    t.call(Helper::RestoreState, &[addr, f]);
    t.end_dispatch();
}
