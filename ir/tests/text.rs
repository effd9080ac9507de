//! The text form: printing and parsing are inverse, and errors say where.

use twofold_ir::parse::parse;
use twofold_ir::passes::{Options, Passes};
use twofold_ir::testing::{Rng, Shape, random_block};
use twofold_ir::verify::verify;

#[test]
fn printed_blocks_are_read_back() {
    let mut rng = Rng(3);
    let mut passes = Passes::default();
    for round in 0..5_000 {
        let shape = Shape { vectors: round % 2 == 0, effects: true, ..Shape::random(&mut rng) };
        let mut block = random_block(&mut rng, shape);
        if round % 3 == 0 {
            passes.run(&mut block, &Options::default());
        }
        let text = block.to_string();
        let back = parse(&text).unwrap_or_else(|e| panic!("{e}\n{text}"));
        assert_eq!(back, block, "{text}");
        assert_eq!(back.to_string(), text);
    }
}

/// A block with `body` as its ops.
fn block(body: &str) -> String {
    format!("block flags 0x2 retired 1\ninsn 0x0 len 1\n{body}\nend jump 0x1\n")
}

#[test]
fn names_and_comments() {
    let b = parse(&block("  ; nothing here\n  sum = get.i64 rax ; the accumulator\n  put.i64 rbx, sum")).unwrap();
    assert_eq!(b.to_string(), block("  v0 = get.i64 rax\n  put.i64 rbx, v0"));
    verify(&b).unwrap();
}

#[test]
fn errors_name_the_line_and_the_reason() {
    for (body, reason) in [
        ("v0 = get.i64 nowhere", "no place nowhere"),
        ("v0 = get.i65 rax", "not a type: i65"),
        ("v0 = frob.i64 rax", "no op frob"),
        ("v0 = add.i64 v1, v2", "no value v1"),
        ("v0 = const.i64", "too short"),
        ("v0 = const.i64 1 2", "unexpected 2"),
        ("v0 = const.i64 twelve", "not a number"),
        ("const.i64 1", "the value has no name"),
        ("v0 = nop", "the op makes no value"),
        ("v0 = const.i64 1\nstore.i64.loud v0, v0", "no flag loud"),
        ("v0 = vec.frob 0", "no vector op frob"),
        ("v0 = call.frob", "no helper frob"),
        ("v0 = cond.q", "no condition q"),
        ("v0 = const.i8 1\nexit_if.0 v0 retired 0 nowhere", "no exit nowhere"),
        ("v0 = const.i8 1\nexit_if.0 v0 retired 0 raise 0x0 zz", "no exception zz"),
        ("v0 = const.i8 1\nexit_if.1 v0 retired 0 jump 0x0", "no exit 0"),
        ("v0 = half.mid v0", "not a half"),
    ] {
        let e = parse(&block(body)).unwrap_err();
        assert!(e.contains(reason), "{body}: {e}");
    }
    assert_eq!(parse("").unwrap_err(), "no block");
    assert!(parse(&block("v0 = frob 1")).unwrap_err().starts_with("line 3:"));
}

#[test]
fn the_verifier_says_what_is_wrong() {
    for (body, reason) in [
        ("v0 = const.i8 0x100", "wider than its type"),
        ("v0 = const.v128 0x1", "not an integer type"),
        ("v0 = const.i8 1\nv1 = const.i16 1\nv2 = add.i8 v0, v1", "v1 is I16, not I8"),
        ("v0 = const.i8 1\nput.i64 rax, v0", "v0 is I8, not I64"),
        ("v0 = const.i8 1\nv1 = zext.i8 v0", "extension from I8"),
        ("v0 = const.i8 1\nv1 = trunc.i16 v0", "truncation from I8"),
        ("v0 = const.i8 1\nv1 = bswap.i8 v0", "bswap of a byte"),
        ("v0 = const.i8 1\nv1 = load.i64 v0", "v0 is I8, not I64"),
        ("v0 = const.i64 1\nv1 = half.lo v0", "v0 is I64, not V128"),
        ("v0 = const.i64 1\nexit_if.0 v0 retired 0 jump 0x0", "v0 is I64, not I8"),
        ("v0 = const.i8 1\nexit_if.0 v0 retired 0 jump 0x1000", "page offset 0x1000"),
        ("v0 = const.i8 1\nexit_if.0 v0 retired 9 jump 0x0", "retires 9 instructions"),
        ("v0 = get.i64 @0xfffc", "outside the guest state"),
        ("v0 = get.i32 @0x0", "outside the guest state"),
        ("v0 = get.i64 rax\nv1 = call.rdtsc v0", "too many arguments"),
        ("v0 = call.cli\nv1 = call.seg_addr v0, v0", "used before it is made"),
        ("insn 0x0 len 1\nv0 = flags", "out of order"),
        ("insn 0x4 len 16\nv0 = flags", "16 bytes"),
    ] {
        let b = parse(&block(body)).unwrap_or_else(|e| panic!("{body}: {e}"));
        let e = verify(&b).expect_err(body);
        assert!(e.contains(reason), "{body}: {e}");
    }
    let no_end = parse("block flags 0x2 retired 0\ninsn 0x0 len 1").unwrap();
    assert_eq!(verify(&no_end).unwrap_err(), "no terminal");
    let no_insn = parse("block flags 0x2 retired 0\nend helped").unwrap();
    assert_eq!(verify(&no_insn).unwrap_err(), "no guest instruction");
    let retires = parse("block flags 0x2 retired 2\ninsn 0x0 len 1\nend helped").unwrap();
    assert_eq!(verify(&retires).unwrap_err(), "retires 2 of 1 instructions");
}
