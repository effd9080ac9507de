//! `--code-cache` and `--code-memory`: a second run starts warm and does the same, whatever the files hold and whoever else
//! writes them; a small code memory changes nothing but the time.
#![cfg(all(target_arch = "x86_64", not(portable_host)))] // there is no compiled code elsewhere

mod support;

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use iced_x86::BlockEncoderOptions;
use iced_x86::code_asm::*;
use serde_json::Value;
use support::{Outcome, guests, multiboot, scratch, twofold_with};

const LIMIT: Duration = Duration::from_secs(240);

/// A guest that computes with loops and calls, patches one of its own instructions, and tells what came out on port 0xe9.
fn guest() -> Vec<u8> {
    let (_, patched) = assemble(0x11_1111).expect("assembles");
    multiboot(&assemble(patched).expect("assembles").0)
}

/// Its code, and where the patched instruction is, which the code has to know.
fn assemble(at: u32) -> Result<(Vec<u8>, u32), iced_x86::IcedError> {
    let mut a = CodeAssembler::new(32)?;
    let (mut outer, mut inner, mut mix, mut patched, mut print, mut digit) =
        (a.create_label(), a.create_label(), a.create_label(), a.create_label(), a.create_label(), a.create_label());
    a.mov(esp, 0x20_0000)?;
    a.mov(esi, 40)?;
    a.xor(eax, eax)?;
    a.set_label(&mut outer)?;
    a.mov(ecx, 100)?;
    a.set_label(&mut inner)?;
    a.call(mix)?;
    a.dec(ecx)?;
    a.jnz(inner)?;
    // The immediate of the instruction at `patched` follows ESI.
    a.mov(dword_ptr(at + 1), esi)?;
    a.dec(esi)?;
    a.jnz(outer)?;
    a.mov(ebx, eax)?;
    a.mov(ecx, 8)?;
    a.set_label(&mut print)?;
    a.rol(ebx, 4)?;
    a.mov(eax, ebx)?;
    a.and(eax, 15)?;
    a.add(eax, 'A' as i32)?;
    a.call(digit)?;
    a.dec(ecx)?;
    a.jnz(print)?;
    a.mov(eax, 3)?;
    a.mov(edx, 0xf4)?;
    a.out(dx, eax)?;
    a.set_label(&mut mix)?;
    a.imul_3(eax, eax, 31)?;
    a.add(eax, ecx)?;
    a.set_label(&mut patched)?;
    a.add(eax, 0x1234_5678u32 as i32)?;
    a.rol(eax, 5)?;
    a.ret()?;
    a.set_label(&mut digit)?;
    a.out(0xe9, al)?;
    a.ret()?;
    let code = a.assemble_options(0x10_0020, BlockEncoderOptions::RETURN_NEW_INSTRUCTION_OFFSETS)?;
    let patched = code.label_ip(&patched)? as u32;
    Ok((code.inner.code_buffer, patched))
}

struct Bench {
    dir: PathBuf,
    kernel: PathBuf,
}

impl Bench {
    fn new(test: &str) -> Self {
        let dir = scratch(test);
        let kernel = dir.join("kernel");
        fs::write(&kernel, guest()).expect("scratch file");
        Self { dir, kernel }
    }

    fn cache(&self) -> PathBuf {
        self.dir.join("cache")
    }

    /// The cache's only file.
    fn file(&self) -> PathBuf {
        let files: Vec<_> =
            fs::read_dir(self.cache()).expect("a directory").map(|f| f.expect("a file").path()).collect();
        assert_eq!(files.len(), 1, "one file, none left over: {files:?}");
        files[0].clone()
    }

    #[track_caller]
    fn run(&self, more: &[&str]) -> (Outcome, Value) {
        let stats = self.dir.join("stats");
        let cache = self.cache();
        let text = |p: &Path| p.to_str().expect("UTF-8").to_owned();
        let (kernel, stats_arg, cache) = (text(&self.kernel), text(&stats), text(&cache));
        let mut args = vec!["run", "--kernel", &kernel, "--memory", "16M", "--serial", "none", "--debugcon", "stdio"];
        args.extend(["--stats", &stats_arg, "--tier", "quick", "--code-cache", &cache]);
        args.extend(more);
        let run = twofold_with(&args, LIMIT);
        run.expect_status(7);
        let text = fs::read_to_string(&stats).expect("the stats file was written");
        (run, serde_json::from_str(&text).expect("JSON"))
    }
}

fn count(stats: &Value, key: &str) -> u64 {
    stats["translation"]["cache"][key].as_u64().unwrap_or_else(|| panic!("{key}: {}", stats["translation"]))
}

fn warnings(run: &Outcome) -> usize {
    run.stderr.lines().filter(|l| l.starts_with("twofold: warning: code cache")).count()
}

#[test]
fn a_second_run_starts_warm_and_does_the_same() {
    let bench = Bench::new("cache-warm");
    let (cold, stats) = bench.run(&[]);
    assert_eq!((count(&stats, "loaded"), count(&stats, "hits")), (0, 0));
    let added = count(&stats, "added");
    // The patched block is a new one each time.
    assert!(added > 40, "{added}");
    let (warm, stats) = bench.run(&[]);
    assert_eq!((warm.stdout.as_str(), warnings(&warm)), (cold.stdout.as_str(), 0));
    assert_eq!((count(&stats, "loaded"), count(&stats, "added")), (added, 0));
    assert!(count(&stats, "hits") >= added);
    // What writes to its own block runs alone, and is not kept.
    assert_eq!(stats["translation"]["tbs"], count(&stats, "misses"));
    assert_eq!(cold.stdout.len(), 8);
    // The evaluator, which has no use for it, agrees.
    let (eval, _) = bench.run(&["--no-regions"]);
    assert_eq!(eval.stdout, cold.stdout);
}

/// Files cut short, damaged anywhere, of another build, or something else altogether: one warning, the same outcome, and
/// the run after has a good file again.
#[test]
fn bad_files_are_ignored_and_made_anew() {
    let bench = Bench::new("cache-bad");
    let (cold, _) = bench.run(&[]);
    let file = bench.file();
    let good = fs::read(&file).expect("the cache was written");
    let flipped = |at: usize| {
        let mut bad = good.clone();
        bad[at] ^= 0x10;
        bad
    };
    let n = good.len();
    let mut bad: Vec<Vec<u8>> = [1, 16, 40, n / 2, n - 1].iter().map(|&len| good[..len].to_vec()).collect();
    bad.extend([0, 17, 30, n / 3, n / 2, n - 1].map(flipped));
    bad.extend([vec![0; 100], b"#!/bin/sh\n".to_vec(), [&good[..], &[1, 2, 3]].concat()]);
    for (i, bytes) in bad.iter().enumerate() {
        fs::write(&file, bytes).expect("scratch file");
        let (run, _) = bench.run(&[]);
        assert_eq!((run.stdout.as_str(), warnings(&run)), (cold.stdout.as_str(), 1), "case {i}:\n{}", run.shown());
        let (run, stats) = bench.run(&[]);
        assert_eq!((run.stdout.as_str(), warnings(&run)), (cold.stdout.as_str(), 0), "case {i}:\n{}", run.shown());
        assert_eq!(count(&stats, "added"), 0, "case {i}");
    }
}

/// Other bytes at the same place are other blocks; another CPU model has a file of its own.
#[test]
fn nothing_is_found_that_was_made_of_something_else() {
    let bench = Bench::new("cache-foreign");
    bench.run(&[]);
    let (_, stats) = bench.run(&["--cpu", "max,-avx2"]);
    assert_eq!((count(&stats, "loaded"), count(&stats, "hits")), (0, 0));
    assert_eq!(fs::read_dir(bench.cache()).expect("a directory").count(), 2);
}

#[test]
fn runs_at_the_same_time_share_a_directory() {
    let bench = Bench::new("cache-shared");
    let other = |i: usize| {
        let dir = bench.dir.join(format!("run{i}"));
        fs::create_dir_all(&dir).expect("scratch directory");
        std::os::unix::fs::symlink(bench.cache(), dir.join("cache")).expect("a link");
        Bench { dir, kernel: bench.kernel.clone() }
    };
    fs::create_dir_all(bench.cache()).expect("scratch directory");
    let runs: Vec<_> = (0..6).map(other).collect();
    let outcomes: Vec<_> = std::thread::scope(|s| {
        runs.iter()
            .map(|b| s.spawn(|| b.run(&[]).0))
            .collect::<Vec<_>>()
            .into_iter()
            .map(|t| t.join().expect("ran"))
            .collect()
    });
    let (last, stats) = bench.run(&[]);
    assert_eq!((count(&stats, "added"), warnings(&last)), (0, 0));
    for run in outcomes {
        assert_eq!((run.stdout.as_str(), warnings(&run)), (last.stdout.as_str(), 0), "{}", run.shown());
    }
    bench.file();
}

#[test]
fn a_directory_that_cannot_be_made_is_refused() {
    let bench = Bench::new("cache-refused");
    let kernel = bench.kernel.to_str().expect("UTF-8");
    let under_a_file = bench.kernel.join("cache");
    twofold_with(&["run", "--kernel", kernel, "--code-cache", under_a_file.to_str().expect("UTF-8")], LIMIT)
        .expect_refused("--code-cache");
    twofold_with(&["run", "--kernel", kernel, "--code-memory", "1M"], LIMIT).expect_refused("at least 2M");
}

/// Debian boots from a warm cache, and in the smallest code memory, where most code is evicted again and again.
#[test]
fn debian_boots_warm_and_in_little_code_memory() {
    let Some(dir) = guests(false) else { return };
    let own = scratch("cache-debian");
    let text = |p: PathBuf| p.to_str().expect("UTF-8").to_owned();
    let (kernel, initrd) = (text(dir.join("amd64.vmlinuz")), text(dir.join("hello64.zst")));
    let (stats, cache) = (text(own.join("stats")), text(own.join("cache")));
    let boot = |more: &[&str]| -> Value {
        let mut args = vec!["run", "--kernel", &kernel, "--initrd", &initrd, "--append", "console=ttyS0 quiet"];
        args.extend(["--stats", &stats]);
        args.extend(more);
        let run = twofold_with(&args, LIMIT);
        run.expect_status(0);
        assert!(run.stdout.contains("BOOT-OK"), "{}", run.shown());
        serde_json::from_str(&fs::read_to_string(&stats).expect("the stats file was written")).expect("JSON")
    };
    boot(&["--code-cache", &cache]);
    let warm = boot(&["--code-cache", &cache]);
    assert!(count(&warm, "hits") > 10_000, "{}", warm["translation"]);
    let small = boot(&["--code-cache", &cache, "--code-memory", "2M"]);
    assert!(small["translation"]["evicted_tbs"].as_u64() > Some(1000), "{}", small["translation"]);
    assert!(small["translation"]["code_memory_peak"].as_u64() < Some(3 << 20), "{}", small["translation"]);
}
