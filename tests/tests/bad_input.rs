//! Bad input ends with the documented exit status and one line that says what is wrong, never with a panic.
//!
//! The guests here are a few bytes of 32-bit code behind a Multiboot header, so nothing but the file itself is tested.

mod support;

use std::fs;
use std::path::PathBuf;
use std::time::Duration;
use support::{Outcome, guests, multiboot, scratch, twofold, twofold_with};

const LIMIT: Duration = Duration::from_secs(60);

/// `cli; hlt; jmp back`: a guest that can never wake.
const HALT_FOR_GOOD: &[u8] = &[0xfa, 0xf4, 0xeb, 0xfd];
/// `mov eax, 3; mov dx, 0xf4; out dx, eax`: ends by isa-debug-exit with status 7.
const EXIT_7: &[u8] = &[0xb8, 3, 0, 0, 0, 0x66, 0xba, 0xf4, 0, 0xef, 0xeb, 0xfe];

/// Writes `bytes` as a file of `test` and names it.
fn file(test: &str, name: &str, bytes: &[u8]) -> PathBuf {
    let dir = scratch(test);
    let path = dir.join(name);
    fs::write(&path, bytes).expect("scratch file");
    path
}

/// Runs `bytes` as a kernel with `more` arguments.
#[track_caller]
fn run_kernel(test: &str, bytes: &[u8], more: &[&str]) -> Outcome {
    let path = file(test, "kernel.bin", bytes);
    let mut args = vec!["run", "--kernel", path.to_str().expect("UTF-8"), "--memory", "16M"];
    args.extend(more);
    twofold_with(&args, LIMIT)
}

/// The same with code behind a Multiboot header.
#[track_caller]
fn run_code(test: &str, code: &[u8], more: &[&str]) -> Outcome {
    run_kernel(test, &multiboot(code), more)
}

// Files

#[test]
fn no_kernel_at_all() {
    twofold_with(&["run"], LIMIT).expect_refused("kernel");
}

#[test]
fn missing_kernel() {
    twofold_with(&["run", "--kernel", "/nonexistent/vmlinuz"], LIMIT).expect_refused("/nonexistent/vmlinuz");
}

#[test]
fn missing_initrd() {
    run_code("missing_initrd", EXIT_7, &["--initrd", "/nonexistent/initrd"]).expect_refused("/nonexistent/initrd");
}

#[test]
fn kernel_is_a_directory() {
    let dir = scratch("kernel_is_a_directory");
    let dir = dir.to_str().expect("UTF-8");
    twofold_with(&["run", "--kernel", dir], LIMIT).expect_refused(dir);
}

#[test]
fn foreign_kernels() {
    let mut png = b"\x89PNG\r\n\x1a\n".to_vec();
    png.resize(4096, 0x55);
    let cases: [(&str, Vec<u8>); 6] = [
        ("empty", Vec::new()),
        ("one_byte", vec![0x7f]),
        ("text", b"#!/bin/sh\necho not a kernel\n".repeat(100)),
        ("png", png),
        ("zeros", vec![0; 1 << 16]),
        ("noise", (0..1u32 << 16).map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8).collect()),
    ];
    for (name, bytes) in cases {
        run_kernel(&format!("foreign_{name}"), &bytes, &[]).expect_refused("kernel.bin");
    }
}

/// A little ELF header (64-bit, little-endian) with one program header; `edit` spoils it.
fn elf(machine: u16, phoff: u64, phnum: u16) -> Vec<u8> {
    let mut e = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0".to_vec();
    e.extend(2u16.to_le_bytes());
    e.extend(machine.to_le_bytes());
    e.extend(1u32.to_le_bytes());
    e.extend(0x10_0000u64.to_le_bytes());
    e.extend(phoff.to_le_bytes());
    e.extend(0u64.to_le_bytes());
    e.extend(0u32.to_le_bytes());
    for half in [64u16, 56, phnum, 64, 0, 0] {
        e.extend(half.to_le_bytes());
    }
    e
}

/// A PT_LOAD of `filesz`/`memsz` bytes from `offset` to `paddr`.
fn load(offset: u64, paddr: u64, filesz: u64, memsz: u64) -> Vec<u8> {
    let mut p = Vec::new();
    p.extend(1u32.to_le_bytes());
    p.extend(7u32.to_le_bytes());
    for word in [offset, paddr, paddr, filesz, memsz, 0x1000] {
        p.extend(word.to_le_bytes());
    }
    p
}

/// A PVH entry note at file offset `at` (XEN_ELFNOTE_PHYS32_ENTRY), and the PT_NOTE for it.
fn pvh_note(at: u64, entry: u32) -> (Vec<u8>, Vec<u8>) {
    let mut note = Vec::new();
    for word in [4u32, 4, 18] {
        note.extend(word.to_le_bytes());
    }
    note.extend(b"Xen\0");
    note.extend(entry.to_le_bytes());
    let mut header = Vec::new();
    header.extend(4u32.to_le_bytes());
    header.extend(4u32.to_le_bytes());
    for word in [at, 0, 0, note.len() as u64, note.len() as u64, 4] {
        header.extend(word.to_le_bytes());
    }
    (header, note)
}

/// A PVH ELF whose only segment is `segment`.
fn pvh_elf(segment: &[u8], entry: u32) -> Vec<u8> {
    let (header, note) = pvh_note(64 + 2 * 56, entry);
    [elf(62, 64, 2), segment.to_vec(), header, note].concat()
}

#[test]
fn bad_elf_files() {
    let this_program = fs::read(twofold()).expect("own binary");
    let cases: [(&str, Vec<u8>); 10] = [
        ("elf_arm", [elf(183, 64, 1), load(0, 0x10_0000, 64, 64)].concat()),
        ("elf_header_only", elf(62, 64, 1)),
        ("elf_cut_in_header", elf(62, 64, 1)[..40].to_vec()),
        ("elf_table_past_the_end", elf(62, u64::MAX - 8, 1)),
        ("elf_too_many_headers", elf(62, 64, u16::MAX)),
        ("elf_no_pvh_note", [elf(62, 64, 1), load(0, 0x10_0000, 64, 64)].concat()),
        ("elf_user_program", this_program),
        ("elf_segment_past_the_file", pvh_elf(&load(u64::MAX - 4, 0x10_0000, 4096, 4096), 0x10_0000)),
        ("elf_segment_outside_memory", pvh_elf(&load(0, 1 << 40, 64, 64), 0x10_0000)),
        ("elf_segment_wraps", pvh_elf(&load(0, u64::MAX - 16, 64, u64::MAX), 0x10_0000)),
    ];
    for (name, bytes) in cases {
        run_kernel(name, &bytes, &[]).expect_refused("kernel.bin");
    }
}

#[test]
fn bad_multiboot_files() {
    let words = |w: [u32; 8]| -> Vec<u8> { w.iter().flat_map(|w| w.to_le_bytes()).collect() };
    let sum = 0u32.wrapping_sub(0x1bad_b002 + 0x1_0000);
    let good = [0x1bad_b002, 0x1_0000, sum, 0x10_0000, 0x10_0000, 0x10_1000, 0x10_2000, 0x10_0020];
    let with = |i: usize, v: u32| {
        let mut w = good;
        w[i] = v;
        words(w)
    };
    let cases: [(&str, Vec<u8>); 5] = [
        ("mb_wrong_checksum", with(2, sum ^ 1)),
        ("mb_past_the_file", with(5, 0x20_0000)),
        ("mb_outside_memory", {
            let mut w = good;
            (w[3], w[4], w[5], w[6], w[7]) = (0xf000_0000, 0xf000_0000, 0xf000_0020, 0xf000_1000, 0xf000_0000);
            words(w)
        }),
        ("mb_ends_before_it_starts", with(5, 0x0f_0000)),
        ("mb_cut_in_header", words(good)[..20].to_vec()),
    ];
    for (name, bytes) in cases {
        run_kernel(name, &bytes, &[]).expect_refused("kernel.bin");
    }
}

#[test]
fn truncated_linux() {
    let Some(dir) = guests(false) else { return };
    let whole = fs::read(dir.join("amd64.vmlinuz")).expect("kernel");
    for length in [1, 512, 0x1f1, 0x202, 0x210, 0x260, 4096, 0x8000, whole.len() / 2, whole.len() - 4096] {
        let test = format!("truncated_linux_{length}");
        run_kernel(&test, &whole[..length], &["--memory", "512M"]).expect_refused("kernel.bin");
    }
}

#[test]
fn stats_file_cannot_be_written() {
    run_code("stats_unwritable", EXIT_7, &["--stats", "/nonexistent/stats.json"])
        .expect_refused("/nonexistent/stats.json");
}

#[test]
fn stats_of_a_bad_file() {
    twofold_with(&["stats", "/nonexistent/stats.json"], LIMIT).expect_refused("/nonexistent/stats.json");
    for (name, text) in
        [("empty", ""), ("text", "hello"), ("foreign", "{\"schema\": 3}"), ("cut", "{\"schema\": \"two")]
    {
        let path = file(&format!("bad_stats_{name}"), "stats.json", text.as_bytes());
        twofold_with(&["stats", path.to_str().expect("UTF-8")], LIMIT).expect_refused("stats.json");
    }
}

// Options

#[test]
fn bad_memory_sizes() {
    for size in ["0", "0M", "", "abc", "-5M", "512X", "1e9", "99999999999999999999", "18446744073709551615G", "1024T"] {
        let size = format!("--memory={size}");
        run_code("bad_memory_sizes", EXIT_7, &[&size]).expect_refused("memory");
    }
}

#[test]
fn memory_too_small_for_the_kernel() {
    let Some(dir) = guests(false) else { return };
    let kernel = dir.join("amd64.vmlinuz");
    let run = twofold_with(&["run", "--kernel", kernel.to_str().expect("UTF-8"), "--memory", "8M"], LIMIT);
    run.expect_refused("memory");
}

#[test]
fn initrd_larger_than_memory() {
    let initrd = file("initrd_larger_than_memory_2", "initrd.bin", &vec![0; 32 << 20]);
    run_code("initrd_larger_than_memory", EXIT_7, &["--initrd", initrd.to_str().expect("UTF-8")])
        .expect_refused("initrd");
}

#[test]
fn unknown_cpus_and_flags() {
    run_code("unknown_cpu", EXIT_7, &["--cpu", "z80"]).expect_refused("z80");
    run_code("unknown_flag", EXIT_7, &["--cpu", "max,+warpdrive"]).expect_refused("warpdrive");
    run_code("unknown_flag_off", EXIT_7, &["--cpu", "max,-warpdrive"]).expect_refused("warpdrive");
    run_code("flag_without_sign", EXIT_7, &["--cpu", "max,sse2"]).expect_refused("sse2");
}

#[test]
fn bad_option_values() {
    for (option, value) in [
        ("--tier", "warp"),
        ("--flush-policy", "never"),
        ("--timeout", "soon"),
        ("--timeout", "-1"),
        ("--cpus", "0"),
        ("--cpus", "100000"),
        ("--on-reset", "explode"),
        ("--serial", "smoke-signals"),
        ("--perf", "everything"),
        ("-d", "nonsense"),
    ] {
        let arg = if option == "-d" { format!("-d{value}") } else { format!("{option}={value}") };
        run_code("bad_option_values", EXIT_7, &[&arg]).expect_refused(value);
    }
}

#[test]
fn unknown_options_and_commands() {
    twofold_with(&["run", "--frobnicate"], LIMIT).expect_refused("frobnicate");
    twofold_with(&["frobnicate"], LIMIT).expect_refused("frobnicate");
}

// Guests that end badly

#[test]
fn guests_exit_status() {
    run_code("guests_exit_status", EXIT_7, &[]).expect_status(7);
    // Two bytes wide; and masked to eight bits: (0x1ff << 1 | 1) & 0xff.
    let word = [0xb8, 0xff, 1, 0, 0, 0x66, 0xba, 0xf4, 0, 0x66, 0xef, 0xeb, 0xfe];
    run_code("guests_exit_status_16", &word, &[]).expect_status(0xff);
}

#[test]
fn triple_fault() {
    // lidt of a zero limit, then ud2.
    let code = [0x0f, 0x01, 0x1d, 0x29, 0x00, 0x10, 0x00, 0x0f, 0x0b, 0, 0, 0, 0, 0, 0];
    let run = run_code("triple_fault", &code, &[]);
    run.expect_status(6);
    assert!(run.stderr.contains("triple fault"), "says why:\n{}", run.shown());
    assert!(run.stderr.to_lowercase().contains("rip"), "dumps the registers:\n{}", run.shown());
}

/// Faults whose delivery faults: stack and IDT outside memory.
#[test]
fn triple_fault_by_wild_stack_and_idt() {
    // mov esp, 0xfff00000; lidt [wild]; int3
    let code = [0xbc, 0, 0, 0xf0, 0xff, 0x0f, 0x01, 0x1d, 0x2d, 0x00, 0x10, 0x00, 0xcc, 0xff, 0xff, 0, 0, 0xe0, 0xff];
    run_code("triple_fault_wild", &code, &[]).expect_status(6);
}

#[test]
fn reset_through_the_keyboard_controller() {
    // mov al, 0xfe; out 0x64, al; jmp $
    run_code("reset_8042", &[0xb0, 0xfe, 0xe6, 0x64, 0xeb, 0xfe], &[]).expect_status(6);
}

#[test]
fn spinning_guest_times_out() {
    let run = run_code("spin", &[0xeb, 0xfe], &["--timeout", "1"]);
    run.expect_status(4);
    assert!(run.wall > Duration::from_millis(900) && run.wall < Duration::from_secs(15), "{:?}", run.wall);
    // With interrupts on, and in the evaluator.
    run_code("spin_eval", &[0xeb, 0xfe], &["--timeout", "1", "--tier", "eval"]).expect_status(4);
}

/// `sti; hlt; jmp back`, with closed input and every interrupt masked (the timer runs as a BIOS leaves it): it never wakes
/// either, whether twofold sees that at once (8) or waits for the timeout (4).
#[test]
fn halted_guest_with_interrupts_on() {
    let run = run_code("halt_sti", &[0xb0, 0xff, 0xe6, 0x21, 0xe6, 0xa1, 0xfb, 0xf4, 0xeb, 0xfd], &["--timeout", "1"]);
    assert!(matches!(run.status, Some(4 | 8)), "{}", run.shown());
    assert!(!run.stderr.contains("panicked at"), "{}", run.shown());
}

#[test]
fn halts_for_good() {
    let run = run_code("halts_for_good", HALT_FOR_GOOD, &["--timeout", "30"]);
    run.expect_status(8);
    assert!(run.wall < Duration::from_secs(10), "at once, not by the timeout: {:?}", run.wall);
}

/// Code that runs off the end of memory into nothing ends somehow, but never in a panic.
#[test]
fn runs_into_nothing() {
    // jmp 0xffff0000
    let code = [0xe9, 0xdb, 0xff, 0xee, 0xff];
    let run = run_code("runs_into_nothing", &code, &["--timeout", "2"]);
    assert!(!run.stderr.contains("panicked at"), "{}", run.shown());
    assert!(matches!(run.status, Some(4 | 6 | 8)), "{}", run.shown());
}

/// A Linux kernel that finds no root panics; with `panic=-1` it resets the machine.
#[test]
fn linux_panic_resets() {
    let Some(dir) = guests(false) else { return };
    let kernel = dir.join("amd64.vmlinuz");
    let args = ["run", "--kernel", kernel.to_str().expect("UTF-8"), "--append", "console=ttyS0 panic=-1"];
    let run = twofold_with(&args, Duration::from_secs(240));
    run.expect_status(6);
    assert!(run.stdout.contains("Kernel panic"), "{}", run.shown());
}
