//! The kernel's paths: system calls, files, signals, processes, page faults, context switches.
#![allow(unsafe_code)] // system calls

use crate::mix;
use std::fs;
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};

const PAGE: usize = 4096;

/// User and system time of this process and of its children that have ended.
pub fn cpu_nanoseconds() -> u64 {
    [libc::RUSAGE_SELF, libc::RUSAGE_CHILDREN].into_iter().fold(0, |sum, who| {
        // SAFETY: all zeros is a valid `rusage`, and the call fills it.
        let usage = unsafe {
            let mut usage: libc::rusage = std::mem::zeroed();
            libc::getrusage(who, &raw mut usage);
            usage
        };
        let ns = |t: libc::timeval| t.tv_sec as u64 * 1_000_000_000 + t.tv_usec as u64 * 1000;
        sum + ns(usage.ru_utime) + ns(usage.ru_stime)
    })
}

/// Keeps this process and its children to one processor, as in a guest with one.
pub fn pin() {
    // SAFETY: all zeros is the empty set; the kernel reads it.
    unsafe {
        let mut set: libc::cpu_set_t = std::mem::zeroed();
        libc::CPU_SET(0, &mut set);
        libc::sched_setaffinity(0, size_of::<libc::cpu_set_t>(), &raw const set);
    }
}

pub fn getppid(units: u64) -> Option<u64> {
    for _ in 0..units * 1000 {
        // SAFETY: takes nothing and cannot fail.
        unsafe { libc::syscall(libc::SYS_getppid) };
    }
    Some(units)
}

pub fn files(units: u64) -> Option<u64> {
    let dir = std::env::temp_dir().join(format!("bench-{}", std::process::id()));
    fs::create_dir_all(&dir).ok()?;
    let (mut sum, mut buffer) = (0, vec![7u8; 4096]);
    for i in 0..units {
        for j in 0..10 {
            let path = dir.join(format!("file{j}"));
            let mut file =
                fs::OpenOptions::new().create(true).truncate(true).read(true).write(true).open(&path).ok()?;
            file.write_all(&buffer).ok()?;
            file.write_all(&buffer[..(i as usize + j) % 4096]).ok()?;
            file.seek(SeekFrom::Start(i % 100)).ok()?;
            file.read_exact(&mut buffer[..512]).ok()?;
            sum = mix(sum, fs::metadata(&path).ok()?.len());
        }
        for j in 0..10 {
            fs::remove_file(dir.join(format!("file{j}"))).ok()?;
        }
    }
    fs::remove_dir(&dir).ok()?;
    Some(sum)
}

static SIGNALS: AtomicU64 = AtomicU64::new(0);

extern "C" fn on_signal(_: i32) {
    SIGNALS.fetch_add(1, Ordering::Relaxed);
}

pub fn signals(units: u64) -> Option<u64> {
    let before = SIGNALS.load(Ordering::Relaxed);
    // SAFETY: the handler only counts.
    unsafe {
        libc::signal(libc::SIGUSR1, on_signal as extern "C" fn(i32) as usize);
        for _ in 0..units * 100 {
            libc::raise(libc::SIGUSR1);
        }
    }
    Some(SIGNALS.load(Ordering::Relaxed) - before)
}

/// Runs `child` in a new process; its exit status.
fn in_child(child: impl FnOnce() -> i32) -> Option<i32> {
    // SAFETY: this program has one thread; the child ends without running anything of the parent's.
    unsafe {
        match libc::fork() {
            -1 => None,
            0 => libc::_exit(child()),
            pid => {
                let mut status = 0;
                (libc::waitpid(pid, &raw mut status, 0) == pid).then_some(status)
            }
        }
    }
}

pub fn fork(units: u64) -> Option<u64> {
    let mut touched = vec![1u8; 64 * PAGE];
    let mut sum = 0;
    for i in 0..units {
        touched[(i as usize * PAGE) % (64 * PAGE)] = i as u8;
        let status = in_child(|| {
            (0..16).for_each(|p| touched[p * PAGE] = 3);
            i32::from(touched[5 * PAGE])
        })?;
        sum = mix(sum, status as u64);
    }
    Some(sum)
}

pub fn exec(units: u64) -> Option<u64> {
    let mut ended = 0;
    for _ in 0..units {
        let status = std::process::Command::new("/proc/self/exe").arg("nothing").status().ok()?;
        ended += u64::from(status.success());
    }
    Some(ended)
}

fn map(pages: usize) -> Option<*mut u8> {
    let (access, kind) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
    // SAFETY: a new mapping wherever the kernel likes.
    let p = unsafe { libc::mmap(std::ptr::null_mut(), pages * PAGE, access, kind, -1, 0) };
    (p != libc::MAP_FAILED).then_some(p.cast())
}

pub fn touch(units: u64) -> Option<u64> {
    let mut sum = 0u64;
    for _ in 0..units {
        const PAGES: usize = 512;
        let p = map(PAGES)?;
        // SAFETY: within the mapping, which nothing else uses.
        unsafe {
            libc::madvise(p.cast(), PAGES * PAGE, libc::MADV_NOHUGEPAGE);
            for i in 0..PAGES {
                sum += u64::from(p.add(i * PAGE).read_volatile());
                p.add(i * PAGE).write_volatile(1);
            }
            libc::munmap(p.cast(), PAGES * PAGE);
        }
    }
    Some(sum)
}

pub fn protect(units: u64) -> Option<u64> {
    const PAGES: usize = 64;
    let p = map(PAGES)?;
    // SAFETY: within the mapping, which nothing else uses, and which may be read at each access.
    unsafe {
        for i in 0..units * 100 {
            let page = p.add(i as usize % PAGES * PAGE);
            page.write_volatile(page.read_volatile().wrapping_add(1));
            libc::mprotect(page.cast(), PAGE, libc::PROT_READ);
            std::hint::black_box(page.read_volatile());
            libc::mprotect(page.cast(), PAGE, libc::PROT_READ | libc::PROT_WRITE);
        }
        let sum = (0..PAGES).fold(0, |s, i| mix(s, u64::from(p.add(i * PAGE).read_volatile())));
        libc::munmap(p.cast(), PAGES * PAGE);
        Some(sum)
    }
}

fn new_pipe() -> Option<(OwnedFd, OwnedFd)> {
    let mut fds = [0; 2];
    // SAFETY: writes the two descriptors, which nothing else owns.
    unsafe { (libc::pipe(fds.as_mut_ptr()) == 0).then(|| (OwnedFd::from_raw_fd(fds[0]), OwnedFd::from_raw_fd(fds[1]))) }
}

/// One byte out, one byte in.
fn bounce(from: &OwnedFd, to: &OwnedFd, rounds: u64) -> bool {
    let mut byte = 0u8;
    (0..rounds).all(|_| {
        // SAFETY: one byte is written, one read.
        unsafe {
            libc::write(to.as_raw_fd(), (&raw const byte).cast(), 1) == 1
                && libc::read(from.as_raw_fd(), (&raw mut byte).cast(), 1) == 1
        }
    })
}

pub fn pipe(units: u64) -> Option<u64> {
    let ((here, there_out), (there, here_out)) = (new_pipe()?, new_pipe()?);
    let rounds = units * 100;
    // SAFETY: as in `in_child`.
    unsafe {
        match libc::fork() {
            -1 => None,
            0 => libc::_exit(i32::from(!bounce(&there, &there_out, rounds))),
            pid => {
                let good = bounce(&here, &here_out, rounds);
                let mut status = 0;
                libc::waitpid(pid, &raw mut status, 0);
                (good && status == 0).then_some(rounds)
            }
        }
    }
}
