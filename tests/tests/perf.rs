//! `--perf`: the map and the dump name guest functions and thunks, and the real `perf` understands them.
#![cfg(all(target_arch = "x86_64", not(portable_host)))] // there is no compiled code elsewhere

mod support;

use std::fs;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use iced_x86::code_asm::*;
use support::{Outcome, scratch, twofold, twofold_with};
use twofold_tests::guest::{Bits, CODE, END, Guest};

const LIMIT: Duration = Duration::from_secs(120);
const DONE: i32 = 0x10 << 1 | 1;

/// A guest that spends its time in two loops, and a System.map that names them.
fn files(test: &str, turns: u32) -> (PathBuf, PathBuf) {
    let mut g = Guest::new(Bits::B64);
    let ((first, second), code) = g.assemble(CODE, |a| {
        let (mut first, mut second) = (a.create_label(), a.create_label());
        a.mov(ecx, turns)?;
        a.set_label(&mut first)?;
        a.imul_3(rax, rax, 33)?;
        a.add(rax, rcx)?;
        a.dec(ecx)?;
        a.jne(first)?;
        a.mov(ecx, turns)?;
        a.set_label(&mut second)?;
        a.crc32(rax, rcx)?;
        a.dec(ecx)?;
        a.jne(second)?;
        a.int(END)?;
        Ok((first, second))
    });
    let ip = |l: &CodeLabel| code.label_ip(l).expect("a label");
    let dir = scratch(test);
    let (kernel, map) = (dir.join("kernel"), dir.join("System.map"));
    fs::write(&kernel, g.image()).expect("scratch file");
    let text = format!(
        "{CODE:016x} T start\n{:016x} T multiply_loop\n{:016x} T checksum_loop\n{:016x} T _end\n",
        ip(&first),
        ip(&second),
        CODE + 0x1000
    );
    fs::write(&map, text).expect("scratch file");
    (kernel, map)
}

/// Runs it with `--perf kind`; what was written, and where.
fn profile(test: &str, kind: &str) -> (Outcome, PathBuf, Vec<u8>) {
    let (kernel, map) = files(test, 200_000);
    let (kernel, map) = (kernel.to_str().expect("UTF-8"), map.to_str().expect("UTF-8"));
    let run = twofold_with(
        &[
            "run",
            "--kernel",
            kernel,
            "--memory",
            "16M",
            "--serial",
            "none",
            "--tier",
            "quick",
            "--symbols",
            map,
            "--perf",
            kind,
        ],
        LIMIT,
    );
    run.expect_status(DONE);
    let note = run.stderr.lines().find_map(|l| l.strip_prefix("twofold: note: the profile for perf is "));
    let path = PathBuf::from(note.expect("the note that says where the profile is"));
    let bytes = fs::read(&path).expect("the profile");
    let _ = fs::remove_file(&path);
    (run, path, bytes)
}

#[test]
fn the_map_names_blocks_and_thunks() {
    let (run, path, bytes) = profile("perf_map", "map");
    assert!(path.starts_with("/tmp") && path.extension().is_some_and(|e| e == "map"), "{path:?}");
    let text = String::from_utf8(bytes).expect("text");
    let mut spans: Vec<(u64, u64)> = Vec::new();
    for line in text.lines() {
        let mut fields = line.splitn(3, ' ');
        let number = |f: Option<&str>| u64::from_str_radix(f.expect("a field"), 16).expect("hexadecimal");
        let (start, len) = (number(fields.next()), number(fields.next()));
        let name = fields.next().expect("a name");
        assert!(len > 0 && (name.starts_with("guest:") || name.starts_with("twofold:thunk_")), "{line}");
        spans.push((start, start + len));
    }
    spans.sort_unstable();
    assert!(spans.windows(2).all(|w| w[0].1 <= w[1].0), "no two overlap");
    for name in ["guest:multiply_loop [quick]", "guest:checksum_loop [quick]", "twofold:thunk_indirect"] {
        assert!(text.contains(name), "{name} is missing:\n{text}\n{}", run.shown());
    }
}

#[test]
fn the_dump_has_names_and_code() {
    let (_, path, bytes) = profile("perf_jitdump", "jitdump");
    assert!(path.file_name().is_some_and(|n| n.to_string_lossy().starts_with("jit-")), "{path:?}");
    let word = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().expect("4 bytes"));
    let long = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().expect("8 bytes"));
    assert_eq!(&bytes[..4], b"DTiJ");
    let (mut at, mut before, mut names) = (word(8) as usize, 0, Vec::new());
    while at < bytes.len() {
        let (kind, size, time) = (word(at), word(at + 4) as usize, long(at + 8));
        assert_eq!(kind, 0, "only code is loaded");
        assert!(time >= before, "in the order of time");
        before = time;
        let len = long(at + 40) as usize;
        let name = &bytes[at + 56..at + size - len];
        let (end, name) = name.split_last().expect("a name");
        assert_eq!(*end, 0);
        names.push(String::from_utf8(name.to_vec()).expect("text"));
        at += size;
    }
    assert_eq!(at, bytes.len());
    for name in ["guest:multiply_loop [quick]", "guest:checksum_loop [quick]", "twofold:thunk_indirect"] {
        assert!(names.iter().any(|n| n == name), "{name} is missing: {names:?}");
    }
}

/// The evaluator has no host code to tell of; the file is there all the same.
#[test]
fn the_evaluator_makes_an_empty_map() {
    let (kernel, _) = files("perf_eval", 100);
    let kernel = kernel.to_str().expect("UTF-8");
    let run = twofold_with(
        &["run", "--kernel", kernel, "--memory", "16M", "--serial", "none", "--tier", "eval", "--perf", "map"],
        LIMIT,
    );
    run.expect_status(DONE);
    let path =
        run.stderr.lines().find_map(|l| l.strip_prefix("twofold: note: the profile for perf is ")).expect("a note");
    assert_eq!(fs::read(path).expect("the profile"), b"");
    let _ = fs::remove_file(path);
}

/// `perf record`, `perf inject --jit` and `perf report`, where they work.
#[test]
fn perf_reports_guest_functions() {
    let (kernel, map) = files("perf_real", 20_000_000);
    let dir = kernel.parent().expect("a directory").to_path_buf();
    let perf = |args: &[&str]| Command::new("perf").current_dir(&dir).env("HOME", &dir).args(args).output();
    if !perf(&["record", "-o", "try.data", "--", "true"]).is_ok_and(|o| o.status.success()) {
        eprintln!("skipped: no perf that may record");
        return;
    }
    let guest = [
        twofold().to_str().expect("UTF-8"),
        "run",
        "--kernel",
        kernel.to_str().expect("UTF-8"),
        "--memory",
        "16M",
        "--serial",
        "none",
        "--symbols",
        map.to_str().expect("UTF-8"),
        "--tier",
        "quick",
        "--perf",
    ];
    for kind in ["map", "jitdump"] {
        let record = ["record", "-q", "-F", "999", "-k", "mono", "-o", "perf.data", "--"];
        let recorded = perf(&[&record[..], &guest[..], &[kind]].concat()).expect("perf runs");
        let note = String::from_utf8_lossy(&recorded.stderr).into_owned();
        let path = note
            .lines()
            .find_map(|l| l.strip_prefix("twofold: note: the profile for perf is "))
            .expect(&note)
            .to_owned();
        let mut data = "perf.data";
        if kind == "jitdump" {
            let injected = perf(&["inject", "--jit", "-i", "perf.data", "-o", "jitted.data"]).expect("perf runs");
            assert!(injected.status.success(), "{}", String::from_utf8_lossy(&injected.stderr));
            data = "jitted.data";
        }
        let report = perf(&["report", "-i", data, "--stdio", "-s", "symbol"]).expect("perf runs");
        let text = String::from_utf8_lossy(&report.stdout).into_owned();
        let _ = fs::remove_file(&path);
        for entry in fs::read_dir("/tmp").into_iter().flatten().flatten() {
            // What `perf inject` made beside the dump.
            let pid: String = path.chars().filter(char::is_ascii_digit).collect();
            if entry.file_name().to_string_lossy().starts_with(&format!("jitted-{pid}-")) {
                let _ = fs::remove_file(entry.path());
            }
        }
        for name in ["guest:multiply_loop [quick]", "guest:checksum_loop [quick]"] {
            assert!(text.contains(name), "{kind}: {name} is missing:\n{text}");
        }
    }
}
