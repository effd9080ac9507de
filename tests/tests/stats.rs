//! What a run says of itself: `--stats` counts right in every tier, `twofold stats` shows it, `-d` traces, resets.

mod support;

use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use iced_x86::code_asm::*;
use serde_json::Value;
use support::{Outcome, guests, multiboot, scratch, twofold_with};
use twofold_runtime::config::DebugItem;
use twofold_tests::guest::{Bits, CODE, DATA, END, Guest, RESUME, TIERS};

const LIMIT: Duration = Duration::from_secs(120);
/// What `twofold run` ends with after [`END`].
const DONE: i32 = 0x10 << 1 | 1;

/// A loop of two blocks: one runs `TURNS` times, the other every fourth time.
const TURNS: u32 = 300_000;

fn counting_guest() -> (Guest, u64, u64) {
    let mut g = Guest::new(Bits::B64);
    let ((top, fourth), code) = g.assemble(CODE, |a| {
        let (mut top, mut fourth, mut skip) = (a.create_label(), a.create_label(), a.create_label());
        a.mov(ecx, TURNS)?;
        a.jmp(top)?;
        a.set_label(&mut top)?;
        a.add(rax, rcx)?;
        a.test(cl, 3)?;
        a.jne(skip)?;
        a.set_label(&mut fourth)?;
        a.inc(rbx)?;
        a.set_label(&mut skip)?;
        a.dec(ecx)?;
        a.jne(top)?;
        a.int(END)?;
        Ok((top, fourth))
    });
    (g, code.label_ip(&top).expect("a label"), code.label_ip(&fourth).expect("a label"))
}

fn executions(stats: &Value, address: u64) -> u64 {
    let wanted = format!("{address:#x}");
    let rows = stats["hot"].as_array().expect("an array");
    rows.iter().filter(|r| r["address"] == wanted.as_str()).map(|r| r["executions"].as_u64().expect("a number")).sum()
}

/// Executions are exact in every tier, whoever ran the block; so are instructions.
#[test]
fn hot_blocks_are_counted_in_every_tier() {
    let (g, top, fourth) = counting_guest();
    for tier in TIERS {
        let stats = g.run(tier).stats;
        assert_eq!(executions(&stats, top), u64::from(TURNS), "{tier:?}");
        assert_eq!(executions(&stats, fourth), u64::from(TURNS / 4), "{tier:?}");
        let total = stats["execution"]["guest_instructions"].as_u64().expect("a number");
        let tiers = stats["execution"]["by_tier"].as_object().expect("an object");
        assert_eq!(tiers.values().map(|v| v.as_u64().expect("a number")).sum::<u64>(), total);
        assert!(total > 5 * u64::from(TURNS) && total < 6 * u64::from(TURNS) + 20_000, "{total}");
    }
}

/// A block that dies leaves its count behind.
#[test]
fn blocks_that_died_are_listed() {
    let mut g = Guest::new(Bits::B64);
    let (hot, code) = g.assemble(CODE, |a| {
        let mut hot = a.create_label();
        a.mov(ecx, TURNS)?;
        a.set_label(&mut hot)?;
        a.dec(ecx)?;
        a.jne(hot)?;
        a.lea(rbx, ptr(hot))?;
        a.mov(byte_ptr(rbx), 0x90)?;
        a.int(END)?;
        Ok(hot)
    });
    let hot = code.label_ip(&hot).expect("a label");
    for tier in TIERS {
        let ran = g.run(tier);
        let first = if tier == TIERS[0] { 1 } else { 0 };
        assert!(executions(&ran.stats, hot) >= u64::from(TURNS - 1 - first), "{tier:?}");
        assert!(ran.stats["smc"]["tbs_dropped"].as_u64() > Some(0), "{tier:?}");
    }
}

fn file(test: &str, name: &str, bytes: &[u8]) -> PathBuf {
    let path = scratch(test).join(name);
    fs::write(&path, bytes).expect("scratch file");
    path
}

fn run(kernel: &std::path::Path, more: &[&str]) -> Outcome {
    let mut args = vec!["run", "--kernel", kernel.to_str().expect("UTF-8"), "--memory", "16M", "--serial", "none"];
    args.extend(more);
    twofold_with(&args, LIMIT)
}

/// `--symbols` with a System.map names the blocks; `twofold stats` shows them, without colours in a pipe.
#[test]
fn symbols_from_a_system_map() {
    let (g, top, _) = counting_guest();
    let kernel = file("symbols_from_a_system_map", "kernel", &g.image());
    let map = format!("{:016x} T entry\n{top:016x} t counting_loop\n{:016x} T _end\n", CODE, CODE + 0x1000);
    let map_file = kernel.with_file_name("System.map");
    fs::write(&map_file, map).expect("scratch file");
    let stats = kernel.with_file_name("stats.json");
    let (map_arg, stats_arg) = (map_file.to_str().expect("UTF-8"), stats.to_str().expect("UTF-8"));
    run(&kernel, &["--symbols", map_arg, "--stats", stats_arg]).expect_status(DONE);
    let value: Value = serde_json::from_str(&fs::read_to_string(&stats).expect("written")).expect("JSON");
    assert_eq!(value["hot"][0]["symbol"], "counting_loop", "{}", value["hot"]);
    let shown = twofold_with(&["stats", stats_arg], LIMIT);
    shown.expect_status(0);
    assert!(shown.stdout.contains("counting_loop"), "{}", shown.shown());
    assert!(!shown.stdout.contains('\u{1b}'), "no colours in a pipe: {}", shown.shown());
}

#[test]
fn symbol_files_that_are_none() {
    let kernel = file("symbol_files_that_are_none", "kernel", &counting_guest().0.image());
    for (name, bytes) in
        [("empty", &b""[..]), ("text", b"hello\n"), ("elf", b"\x7fELF\x02\x01\x01"), ("bytes", &[0xff; 64])]
    {
        let path = kernel.with_file_name(name);
        fs::write(&path, bytes).expect("scratch file");
        run(&kernel, &["--symbols", path.to_str().expect("UTF-8")]).expect_refused(name);
    }
    run(&kernel, &["--symbols", "/nonexistent"]).expect_refused("/nonexistent");
    run(&kernel, &["--symbols", "/"]).expect_refused("--symbols");
}

#[test]
fn stats_files_that_are_none() {
    let dir = scratch("stats_files_that_are_none");
    for (name, text) in
        [("empty", ""), ("list", "[]"), ("other", "{\"schema\":\"x\"}"), ("cut", "{\"schema\":\"twofold-stats/1\",")]
    {
        let path = dir.join(name);
        fs::write(&path, text).expect("scratch file");
        twofold_with(&["stats", path.to_str().expect("UTF-8")], LIMIT).expect_refused(name);
    }
    // The schema alone, and values of other kinds than expected, are shown without a complaint.
    for (name, text) in [
        ("bare", "{\"schema\":\"twofold-stats/1\"}"),
        (
            "odd",
            "{\"schema\":\"twofold-stats/1\",\"run\":7,\"hot\":{\"a\":[]},\"tlb\":[1,2],\"time\":{\"phases\":\"x\"}}",
        ),
    ] {
        let path = dir.join(name);
        fs::write(&path, text).expect("scratch file");
        twofold_with(&["stats", path.to_str().expect("UTF-8")], LIMIT).expect_status(0);
    }
}

/// A guest that does a little of everything that can be traced (but VMX).
fn busy_guest() -> Guest {
    let mut g = Guest::new(Bits::B64);
    g.assemble(CODE, |a| {
        let [mut go_on, mut again, mut next] = [(); 3].map(|()| a.create_label());
        a.lea(rax, ptr(go_on))?;
        a.mov(qword_ptr(RESUME), rax)?;
        a.ud2()?;
        a.set_label(&mut go_on)?;
        a.mov(rcx, 2000u64)?;
        a.set_label(&mut again)?;
        a.dec(rcx)?;
        a.jnz(again)?;
        // A port that nothing answers, twice.
        a.mov(edx, 0x1234)?;
        a.in_(al, dx)?;
        a.in_(al, dx)?;
        a.mov(rax, cr3)?;
        a.mov(cr3, rax)?;
        a.lea(rbx, ptr(next))?;
        a.mov(byte_ptr(rbx + 1), 5)?;
        a.nop()?;
        a.set_label(&mut next)?;
        a.mov(al, 0)?;
        a.mov(qword_ptr(DATA), rax)?;
        a.int(END)
    });
    g
}

/// Every item of `-d` writes lines of its own, which name it or look like what they are.
#[test]
fn every_trace_says_something() {
    let kernel = file("every_trace_says_something", "kernel", &busy_guest().image());
    for (item, name, _) in DebugItem::ALL {
        let compiled = twofold_backend::available();
        let sign = match item {
            DebugItem::Clif | DebugItem::OutAsm if !compiled => "",
            DebugItem::InAsm => "ud2",
            DebugItem::Ir | DebugItem::IrOpt => "get",
            DebugItem::Clif => "function",
            DebugItem::OutAsm => "jmp",
            DebugItem::Exec => "exec: ",
            DebugItem::Int => "int: ",
            DebugItem::Mmu => "mmu: ",
            DebugItem::Tlb => "tlb: ",
            DebugItem::Vmx => "",
            DebugItem::Smc => "smc: ",
            DebugItem::Io => "io: read of port 0x1234",
            DebugItem::Boot => "boot: ",
        };
        let trace = kernel.with_file_name(name);
        let trace_arg = trace.to_str().expect("UTF-8");
        // Only regions go through Cranelift.
        let tier = if item == DebugItem::Clif { "opt" } else { "quick" };
        run(&kernel, &["--tier", tier, "-d", name, "--trace-file", trace_arg]).expect_status(DONE);
        let text = fs::read_to_string(&trace).expect("the trace file");
        assert!(text.contains(sign), "-d {name} has no {sign:?}:\n{}", &text[..text.len().min(2000)]);
        if item == DebugItem::Io {
            assert_eq!(text.matches("0x1234").count(), 1, "each port once: {text}");
        }
    }
    let all: Vec<&str> = DebugItem::ALL.iter().map(|i| i.1).collect();
    let run = run(&kernel, &["-d", &all.join(",")]);
    run.expect_status(DONE);
    assert!(run.stderr.contains("int: ") && run.stderr.contains("boot: "), "without a file they go to stderr");
}

/// `--on-reset reset`: the machine starts again, with its memory as it was, as often as the guest wants.
#[test]
fn a_reset_starts_the_machine_again() {
    const COUNT: i32 = 0x20_0000;
    // Three ways to reset: port 0xcf9, the keyboard controller, a triple fault. Then exit with the count.
    for (way, name) in ["cf9", "8042", "triple"].into_iter().enumerate() {
        let mut a = CodeAssembler::new(32).expect("32-bit code");
        let mut code = || -> Result<Vec<u8>, iced_x86::IcedError> {
            let mut again = a.create_label();
            a.mov(esp, 0x30_0000)?;
            a.inc(dword_ptr(COUNT))?;
            a.mov(eax, dword_ptr(COUNT))?;
            a.cmp(eax, 4)?;
            a.jb(again)?;
            a.mov(edx, 0xf4)?;
            a.out(dx, eax)?;
            a.set_label(&mut again)?;
            match way {
                0 => {
                    a.mov(edx, 0xcf9)?;
                    a.mov(eax, 6)?;
                    a.out(dx, al)?;
                }
                1 => {
                    a.mov(eax, 0xfe)?;
                    a.out(0x64, al)?;
                }
                _ => a.ud2()?,
            }
            a.hlt()?;
            a.assemble(0x10_0020)
        };
        let kernel = file(&format!("reset_{name}"), "kernel", &multiboot(&code().expect("code")));
        for tier in ["auto", "eval", "quick"] {
            run(&kernel, &["--on-reset", "reset", "--tier", tier]).expect_status(4 << 1 | 1);
        }
        run(&kernel, &["--on-reset", "exit"]).expect_status(6);
        let trace = run(&kernel, &["--on-reset", "reset", "-d", "boot"]);
        assert_eq!(trace.stderr.matches("the machine is reset").count(), 3, "{}", trace.shown());
        // The statistics tell of the whole run.
        let stats = run(&kernel, &["--on-reset", "reset", "--stats", "-"]);
        let value: Value = serde_json::from_str(&stats.stdout).expect("JSON");
        let retired = value["execution"]["guest_instructions"].as_u64().expect("a number");
        assert!(retired > 20, "{retired}");
    }
    // A guest that resets for ever is ended from outside.
    let kernel = file("reset_for_ever", "kernel", &multiboot(&[0x0f, 0x0b]));
    run(&kernel, &["--on-reset", "reset", "--timeout", "1"]).expect_status(4);
}

/// Debian's kernel, moved by KASLR: its own tables name its functions.
#[test]
fn debian_names_itself() {
    let Some(dir) = guests(true) else { return };
    for (kernel, initrd, function) in [
        ("amd64.vmlinuz", "hello64.zst", "mpihelp_"),
        ("686.vmlinuz", "hello32.zst", "mpihelp_"),
        ("pae.vmlinuz", "hello32.zst", "mpihelp_"),
    ] {
        let (kernel, initrd) = (dir.join(kernel), dir.join(initrd));
        let stats = scratch("debian_names_itself").join("stats.json");
        let mut args =
            vec!["run", "--kernel", kernel.to_str().expect("UTF-8"), "--initrd", initrd.to_str().expect("UTF-8")];
        args.extend(["--append", "console=ttyS0", "--stats", stats.to_str().expect("UTF-8")]);
        twofold_with(&args, Duration::from_secs(240)).expect_status(0);
        let value: Value = serde_json::from_str(&fs::read_to_string(&stats).expect("written")).expect("JSON");
        let names: Vec<&str> =
            value["hot"].as_array().expect("an array").iter().filter_map(|r| r["symbol"].as_str()).collect();
        assert!(names.len() > 10, "{kernel:?}: {names:?}");
        assert!(names.iter().any(|n| n.contains(function)), "{kernel:?}: {names:?}");
    }
}
