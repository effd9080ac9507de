//! What the passes and the lowering make of blocks that stand for themselves: `tests/golden/*.ir`.
//!
//! Each file has a block, a line `== passes`, what the passes make of it, a line `== words`, and what the evaluator runs.
//! `TWOFOLD_BLESS=1 cargo test -p twofold-ir` writes what it is now.

use std::path::Path;

use twofold_ir::eval::Program;
use twofold_ir::parse::parse;
use twofold_ir::passes::{Options, Passes};
use twofold_ir::verify::verify;

#[test]
fn goldens() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden");
    let bless = std::env::var_os("TWOFOLD_BLESS").is_some_and(|v| v == "1");
    let mut passes = Passes::default();
    let mut seen = 0;
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_none_or(|e| e != "ir") {
            continue;
        }
        seen += 1;
        let text = std::fs::read_to_string(&path).unwrap();
        let input = text.split("== passes\n").next().unwrap();
        let mut block = parse(input).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        verify(&block).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        passes.run(&mut block, &Options::default());
        verify(&block).unwrap_or_else(|e| panic!("{} after the passes: {e}\n{block}", path.display()));
        let now = format!("{input}== passes\n{block}== words\n{}", Program::new(&block));
        if now != text {
            if bless {
                std::fs::write(&path, now).unwrap();
            } else {
                panic!("{} has changed (TWOFOLD_BLESS=1 accepts):\n{now}", path.display());
            }
        }
    }
    assert!(seen > 5, "{seen} goldens");
}
