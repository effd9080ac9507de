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

/// What the hypervisor prints of its guests: which translations each event keeps and drops, and the entries of L1's, L2's and
/// EPT's tables whose accessed flags the next access set again.
const VMX_ROWS: [&str; 35] = [
    "entry, exit   5-level <-> real      EPT          dropped -       kept       9    0     0",
    "entry, exit   5-level <-> real      EPT, VPID    kept    -       kept       0    0     0",
    "entry, exit   5-level <-> no paging EPT          dropped -       kept       9    0     0",
    "entry, exit   5-level <-> no paging EPT, VPID    kept    -       kept       0    0     0",
    "entry, exit   5-level <-> 32-bit    -            dropped dropped -          9    3     0",
    "entry, exit   5-level <-> 32-bit    VPID         kept    kept    -          0    0     0",
    "entry, exit   5-level <-> 32-bit    EPT          dropped dropped kept       9    3     0",
    "entry, exit   5-level <-> 32-bit    EPT, VPID    kept    kept    kept       0    0     0",
    "entry, exit   5-level <-> PAE       -            dropped dropped -          9    3     0",
    "entry, exit   5-level <-> PAE       VPID         kept    kept    -          0    0     0",
    "entry, exit   5-level <-> PAE       EPT          dropped dropped kept       9    3     0",
    "entry, exit   5-level <-> PAE       EPT, VPID    kept    kept    kept       0    0     0",
    "entry, exit   5-level <-> 4-level   -            dropped dropped -          9    7     0",
    "entry, exit   5-level <-> 4-level   VPID         kept    kept    -          0    0     0",
    "entry, exit   5-level <-> 4-level   EPT          dropped dropped kept       9    7     0",
    "entry, exit   5-level <-> 4-level   EPT, VPID    kept    kept    kept       0    0     0",
    "entry, exit   5-level <-> 5-level   -            dropped dropped -          9    9     0",
    "entry, exit   5-level <-> 5-level   VPID         kept    kept    -          0    0     0",
    "entry, exit   5-level <-> 5-level   EPT          dropped dropped kept       9    9     0",
    "entry, exit   5-level <-> 5-level   EPT, VPID    kept    kept    kept       0    0     0",
    "L2: MOV CR3   5-level <-> 4-level   EPT, VPID    kept    dropped kept       0    4     0",
    "L2: INVLPG    5-level <-> 4-level   EPT, VPID    kept    dropped kept       0    4     0",
    "INVVPID 0     5-level <-> 4-level   EPT, VPID    kept    dropped kept       0    4     0",
    "INVVPID 3     5-level <-> 4-level   EPT, VPID    kept    dropped kept       0    4     0",
    "INVVPID 1     5-level <-> 4-level   EPT, VPID    kept    dropped kept       0    7     0",
    "INVVPID 2     5-level <-> 4-level   EPT, VPID    kept    dropped kept       0    7     0",
    "INVEPT 1      5-level <-> 4-level   EPT, VPID    kept    dropped dropped    0    7    11",
    "INVEPT 2      5-level <-> 4-level   EPT, VPID    kept    dropped dropped    0    7    11",
    "EPT violation 5-level <-> 4-level   EPT, VPID    kept    kept    kept       0    0     0",
    "L2: MOV CR3   5-level <-> PAE       VPID         kept    dropped -          0    2     0",
    "L2: INVLPG    5-level <-> PAE       VPID         kept    dropped -          0    2     0",
    "INVVPID 0     5-level <-> PAE       VPID         kept    dropped -          0    2     0",
    "INVVPID 3     5-level <-> PAE       VPID         kept    dropped -          0    2     0",
    "INVVPID 1     5-level <-> PAE       VPID         kept    dropped -          0    3     0",
    "INVVPID 2     5-level <-> PAE       VPID         kept    dropped -          0    3     0",
];

#[track_caller]
fn expect_whole_table(run: &Outcome) {
    run.expect_status(0);
    let mut lines = run.stdout.lines();
    for row in ROWS.into_iter().chain(VMX_ROWS) {
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

/// The demo guest as a file.
fn image(name: &str) -> String {
    let file = support::scratch(name).join("demo.multiboot");
    let file = file.to_str().expect("UTF-8").to_owned();
    twofold_with(&["demo", "--image", &file], Duration::from_secs(60)).expect_status(0);
    file
}

/// The same guest as a file, in each tier.
/// Rows C1, C2, C5, C6, D1, D2, D3, E1, E2, E3, E5, G7: an L1 with L2 guests in every paging mode, with EPT, VPID, both and
/// neither.
#[test]
fn demo_image_in_each_tier() {
    let file = &image("demo");
    for tier in ["auto", "eval", "quick"] {
        let run = twofold_with(&["run", "--kernel", file, "--tier", tier], Duration::from_secs(120));
        expect_whole_table(&run);
    }
}

/// With `--flush-policy full` every event drops everything, and nothing else changes.
#[test]
fn demo_with_full_flushes() {
    let run =
        twofold_with(&["run", "--kernel", &image("demo-full"), "--flush-policy", "full"], Duration::from_secs(120));
    run.expect_status(0);
    let lines = run.stdout.lines().filter(|l| VMX_ROWS.iter().any(|row| row[..49] == *l.get(..49).unwrap_or_default()));
    let lines: Vec<_> = lines.collect();
    assert_eq!(lines.len(), VMX_ROWS.len(), "{}", run.shown());
    assert!(lines.iter().all(|l| l.contains("dropped") && !l.contains("kept")), "{}", run.shown());
}

/// A processor without VMX, or without a part of it, has fewer rows and is as expected.
#[test]
fn demo_on_lesser_processors() {
    let file = image("demo-lesser");
    for (cpu, missing) in [("max,-vmx", 35), ("max,-vmx-ept", 21), ("max,-vmx-secondary-ctls", 31)] {
        let run = twofold_with(&["run", "--kernel", &file, "--cpu", cpu], Duration::from_secs(120));
        run.expect_status(0);
        assert!(run.stdout.contains("All as expected"), "{}", run.shown());
        let there = run.stdout.lines().filter(|l| VMX_ROWS.contains(l)).count();
        assert_eq!(there, VMX_ROWS.len() - missing, "{cpu}: {}", run.shown());
    }
}
