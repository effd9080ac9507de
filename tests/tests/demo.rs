//! Runs `twofold demo` and reads its table: every paging mode, every fault with its error code, the exit status.

mod support;

use std::time::Duration;
use support::{Outcome, twofold_with};

/// The rows that the guest prints, without the columns that may differ from one CPU model to another.
const ROWS: [&str; 17] = [
    "real     divide by 0            #DE",
    "         DS    2000:10, 3000:10 -         -                 A aaaa, B bbbb; 1000 times",
    "32-bit   write c0de1234         #PF 0002  c0de1234          not present; mapped it: 600df00d",
    "         write c0de5678         #PF 0003  c0de5678          read-only; allowed it: 600df00d",
    "         CR3   c0000000         -         -                 A aaaaaaaa, B bbbbbbbb; 1000 times",
    "PAE      write c0de1234         #PF 0002  c0de1234          not present; mapped it: 600df00d",
    "         call  c0de5000         #PF 0011  c0de5000          NX; allowed it, ran: 600df00d",
    "         read  c0de7001         #PF 0009  c0de7001          reserved bit; cleared: 600df00d",
    "         CR3   c0000000         -         -                 A aaaaaaaa, B bbbbbbbb; 1000 times",
    "4-level  write ffffc0de00001234 #PF 0002  ffffc0de00001234  not present; mapped it: 600df00d",
    "         read  ffffd00000000001 #PF 0009  ffffd00000000001  reserved bit; cleared: 600df00d",
    "         read  00ff800000001234 #GP 0000  -                 not canonical; skipped",
    "         CR3   00007ffffffff000 -         -                 A aaaaaaaa, B bbbbbbbb; 1000 times",
    "5-level  write 00ff800000001234 #PF 0002  00ff800000001234  not present; mapped it: 600df00d",
    "         call  ff00c0de00005000 #PF 0011  ff00c0de00005000  NX; allowed it, ran: 600df00d",
    "         read  ff42000000000001 #PF 0009  ff42000000000001  reserved bit; cleared: 600df00d",
    "         CR3   00fffffffffff000 -         -                 A aaaaaaaa, B bbbbbbbb; 1000 times",
];

#[track_caller]
fn expect_whole_table(run: &Outcome) {
    run.expect_status(0);
    let mut lines = run.stdout.lines();
    for row in ROWS {
        assert!(lines.any(|line| line.starts_with(row)), "no line {row:?} in its place:\n{}", run.shown());
    }
    assert!(run.stdout.contains("All as expected"), "{}", run.shown());
    assert!(!run.stdout.contains("WRONG"), "{}", run.shown());
}

#[test]
fn demo() {
    let run = twofold_with(&["demo"], Duration::from_secs(60));
    expect_whole_table(&run);
    assert!(run.wall < Duration::from_secs(5), "a person watches it in under five seconds: {:?}", run.wall);
}

/// The same guest as a file, in each tier.
#[test]
fn demo_image_in_each_tier() {
    let file = support::scratch("demo").join("demo.multiboot");
    let file = file.to_str().expect("UTF-8");
    twofold_with(&["demo", "--image", file], Duration::from_secs(60)).expect_status(0);
    for tier in ["auto", "eval", "quick"] {
        let run = twofold_with(&["run", "--kernel", file, "--tier", tier], Duration::from_secs(120));
        expect_whole_table(&run);
    }
}
