//! `-d out_asm`: guest instructions, IR and host code stand together, each labelled as what it is, in the quick tier and in regions.
#![cfg(all(target_arch = "x86_64", not(portable_host)))]

mod support;

use std::fs;
use std::time::Duration;

use iced_x86::code_asm::*;
use support::{scratch, twofold_with};
use twofold_tests::guest::{Bits, CODE, DATA, END, Guest};

const LIMIT: Duration = Duration::from_secs(60);
const DONE: i32 = 0x10 << 1 | 1;

/// A loop with a load, a store and a side exit.
fn guest() -> Guest {
    let mut g = Guest::new(Bits::B64);
    g.assemble(CODE, |a| {
        let (mut top, mut done) = (a.create_label(), a.create_label());
        a.mov(ebx, DATA)?;
        a.mov(ecx, 300_000)?;
        a.jmp(top)?;
        a.set_label(&mut top)?;
        a.add(rax, qword_ptr(rbx + 8))?;
        a.mov(qword_ptr(rbx + 0x10), rax)?;
        a.nop()?;
        a.dec(ecx)?;
        a.je(done)?;
        a.jmp(top)?;
        a.set_label(&mut done)?;
        a.int(END)?;
        Ok(())
    });
    g
}

/// The listings of the trace that show `wanted` as a guest instruction.
fn listings(tier: &str, wanted: &str) -> Vec<String> {
    let g = guest();
    let kernel = scratch(&format!("out_asm_{tier}")).join("kernel");
    fs::write(&kernel, g.image()).expect("scratch file");
    let trace = kernel.with_file_name("trace");
    let (kernel, trace_arg) = (kernel.to_str().expect("UTF-8"), trace.to_str().expect("UTF-8"));
    let args = ["run", "--kernel", kernel, "--memory", "16M", "--serial", "none", "--tier", tier];
    let more = ["-d", "out_asm", "--trace-file", trace_arg];
    twofold_with(&[&args[..], &more].concat(), LIMIT).expect_status(DONE);
    let text = fs::read_to_string(&trace).expect("the trace file");
    text.split("\n\n").filter(|l| l.contains(wanted)).map(str::to_owned).collect()
}

/// What a listing says of itself in its second line: guest instructions, IR ops, host instructions, bytes.
fn counts(listing: &str) -> [usize; 4] {
    let line = listing.lines().nth(1).expect("a second line");
    let number = |what: &str| {
        let before = line.split(what).next().expect("text");
        before.rsplit([' ', ':']).next().and_then(|n| n.parse().ok()).unwrap_or_else(|| panic!("no {what} in {line}"))
    };
    [number(" guest instructions"), number(" IR ops"), number(" host instructions"), number(" bytes")]
}

/// Offset, length and text of a line of host code.
fn host(line: &str) -> Option<(usize, usize, &str)> {
    let rest = line.strip_prefix("    ").or_else(|| line.strip_prefix("   ~"))?;
    let (at, rest) = rest.trim_start().split_once("  ")?;
    let (hex, text) = rest.split_once("  ")?;
    Some((usize::from_str_radix(at, 16).ok()?, hex.len() / 2, text.trim_start()))
}

fn is_guest(line: &str) -> bool {
    line.len() > 18 && line.as_bytes()[..16].iter().all(u8::is_ascii_hexdigit) && line[16..].starts_with("  ")
}

fn check(listing: &str) {
    let [guest, ops, insns, bytes] = counts(listing);
    let body: Vec<&str> = listing.lines().skip(3).collect();
    assert_eq!(body.iter().filter(|l| is_guest(l)).count(), guest, "each instruction once:\n{listing}");
    let ends = body.iter().filter(|l| l.starts_with("  | end ")).count();
    let ir = body.iter().filter(|l| l.starts_with("  | ")).count();
    assert!(ends >= 1 && ir == ops + ends, "{ir} lines of IR, {ends} of them ends, {ops} ops:\n{listing}");
    let code: Vec<_> = body.iter().filter_map(|l| host(l)).collect();
    assert_eq!(code.len(), insns, "{listing}");
    assert_eq!(code.iter().map(|c| c.1).sum::<usize>(), bytes, "{listing}");
    assert!(code.is_sorted_by(|x, y| x.0 + x.1 <= y.0), "in the order in which it lies:\n{listing}");
    // The instruction, its IR, the access, in this order; what lies elsewhere says what it is.
    let place =
        |what: &str| body.iter().position(|l| l.contains(what)).unwrap_or_else(|| panic!("no {what}:\n{listing}"));
    assert!(body[0].contains("-- entry"), "{listing}");
    let load = place("add rax,[rbx+8h]");
    assert!(is_guest(body[load]) && body[load].contains("48034308"), "bytes and text: {}", body[load]);
    let ir = place(" = load.i64 v");
    let access = load + body[load..].iter().position(|l| l.contains("-- memory access")).expect("an access");
    assert!(load < ir && ir < access, "{listing}");
    for label in ["-- slow path of ", "-- exit of ", "-- budget check"] {
        place(label);
    }
}

/// The quick tier: a block each, in the order of its instructions.
#[test]
fn blocks_of_the_quick_tier() {
    let found = listings("quick", "add rax,[rbx+8h]");
    let block = found.iter().find(|l| l.contains("quick tier: ")).expect("the loop's block");
    check(block);
    let nop = block.lines().position(|l| is_guest(l) && l.ends_with("nop")).expect("an instruction without code");
    assert!(is_guest(block.lines().nth(nop + 1).expect("more")), "nothing comes of a NOP:\n{block}");
}

/// A region: several blocks, and cold code that says whose it is.
#[test]
fn regions() {
    let found = listings("opt", "add rax,[rbx+8h]");
    let region = found.iter().find(|l| l.contains("region: ")).expect("a region of the loop");
    check(region);
    assert!(region.contains("-- slow path of 0000000000"), "{region}");
}
