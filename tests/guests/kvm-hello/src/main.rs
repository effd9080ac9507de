//! The smallest VMM: opens /dev/kvm, runs a few instructions of real-mode code until HLT, and says what came out.
//!
//! A guest test puts it into an initramfs beside kvm.ko and kvm-intel.ko; `KVM-HELLO-OK` on the console means that KVM
//! works in L1. With an argument N it also makes N round trips by port writes and prints their time.
#![allow(unsafe_code)] // ioctls and the memory they share

use std::io::Error;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::time::Instant;

const KVM_GET_API_VERSION: u64 = 0xae00;
const KVM_CREATE_VM: u64 = 0xae01;
const KVM_GET_VCPU_MMAP_SIZE: u64 = 0xae04;
const KVM_CREATE_VCPU: u64 = 0xae41;
const KVM_SET_USER_MEMORY_REGION: u64 = 0x4020_ae46;
const KVM_RUN: u64 = 0xae80;
const KVM_GET_REGS: u64 = 0x8090_ae81;
const KVM_SET_REGS: u64 = 0x4090_ae82;
const KVM_GET_SREGS: u64 = 0x8138_ae83;
const KVM_SET_SREGS: u64 = 0x4138_ae84;

const EXIT_IO: u32 = 2;
const EXIT_HLT: u32 = 5;

const MEMORY: usize = 0x10000;
const CODE: usize = 0x1000;

/// struct kvm_regs: RAX RBX RCX RDX RSI RDI RSP RBP R8…R15 RIP RFLAGS.
type Regs = [u64; 18];

fn call(fd: &impl AsRawFd, request: u64, argument: u64) -> Result<i32, Error> {
    // SAFETY: the requests below get a number or the address of a live structure of the size that the request encodes.
    let r = unsafe { libc::ioctl(fd.as_raw_fd(), request, argument) };
    if r < 0 { Err(Error::last_os_error()) } else { Ok(r) }
}

fn owned(fd: i32) -> OwnedFd {
    // SAFETY: an ioctl has just made it.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

fn map(length: usize, fd: i32, flags: i32) -> Result<*mut u8, Error> {
    // SAFETY: a new mapping wherever the kernel likes.
    let p = unsafe { libc::mmap(std::ptr::null_mut(), length, libc::PROT_READ | libc::PROT_WRITE, flags, fd, 0) };
    if p == libc::MAP_FAILED { Err(Error::last_os_error()) } else { Ok(p.cast()) }
}

/// A virtual machine with one processor in real mode at `CODE`.
struct Vm {
    vcpu: OwnedFd,
    run: *mut u8,
    _vm: OwnedFd,
}

impl Vm {
    fn new(code: &[u8]) -> Result<Self, Error> {
        let kvm = std::fs::OpenOptions::new().read(true).write(true).open("/dev/kvm")?;
        println!("KVM API version {}", call(&kvm, KVM_GET_API_VERSION, 0)?);
        let vm = owned(call(&kvm, KVM_CREATE_VM, 0)?);
        let memory = map(MEMORY, -1, libc::MAP_SHARED | libc::MAP_ANONYMOUS)?;
        // SAFETY: the code fits behind `CODE` in the mapping made above.
        unsafe { std::ptr::copy_nonoverlapping(code.as_ptr(), memory.add(CODE), code.len().min(MEMORY - CODE)) };
        // slot and flags, guest-physical address, size, userspace address
        let region: [u64; 4] = [0, 0, MEMORY as u64, memory as u64];
        call(&vm, KVM_SET_USER_MEMORY_REGION, region.as_ptr() as u64)?;
        let vcpu = owned(call(&vm, KVM_CREATE_VCPU, 0)?);
        let size = call(&kvm, KVM_GET_VCPU_MMAP_SIZE, 0)?;
        let run = map(size as usize, vcpu.as_raw_fd(), libc::MAP_SHARED)?;
        let mut sregs = [0u64; 39];
        call(&vcpu, KVM_GET_SREGS, sregs.as_mut_ptr() as u64)?;
        // CS comes first: base, then limit and selector.
        sregs[0] = 0;
        sregs[1] &= !(0xffff << 32);
        call(&vcpu, KVM_SET_SREGS, sregs.as_ptr() as u64)?;
        Ok(Self { vcpu, run, _vm: vm })
    }

    fn set_regs(&self, rax: u64, rbx: u64, rcx: u64) -> Result<(), Error> {
        let mut regs: Regs = [0; 18];
        (regs[0], regs[1], regs[2]) = (rax, rbx, rcx);
        (regs[16], regs[17]) = (CODE as u64, 2);
        call(&self.vcpu, KVM_SET_REGS, regs.as_ptr() as u64).map(drop)
    }

    /// Runs to the next exit: its reason, and the byte written to a port for `EXIT_IO`.
    fn run(&self) -> Result<(u32, u8), Error> {
        call(&self.vcpu, KVM_RUN, 0)?;
        // SAFETY: struct kvm_run: exit_reason at 8, the union at 32; for port I/O data_offset at its byte 8.
        unsafe {
            let reason = self.run.add(8).cast::<u32>().read_volatile();
            let data = self.run.add(40).cast::<u64>().read_volatile() as usize;
            Ok((reason, if reason == EXIT_IO && data < 0x2000 { self.run.add(data).read_volatile() } else { 0 }))
        }
    }
}

fn hello() -> Result<(), Error> {
    let code = [
        0xba, 0xf8, 0x03, // mov dx, 0x3f8
        0x00, 0xd8, // add al, bl
        0x04, b'0', // add al, '0'
        0xee, // out dx, al
        0xb0, b'\n', // mov al, '\n'
        0xee,  // out dx, al
        0xf4,  // hlt
    ];
    let vm = Vm::new(&code)?;
    vm.set_regs(2, 2, 0)?;
    let mut out = String::new();
    loop {
        match vm.run()? {
            (EXIT_IO, byte) => out.push(char::from(byte)),
            (EXIT_HLT, _) => break,
            (reason, _) => return Err(Error::other(format!("exit reason {reason}"))),
        }
    }
    let mut regs: Regs = [0; 18];
    call(&vm.vcpu, KVM_GET_REGS, regs.as_mut_ptr() as u64)?;
    println!("guest says {out:?}, RIP {:#x}", regs[16]);
    if out == "4\n" { Ok(()) } else { Err(Error::other("that is not 4")) }
}

/// `n` exits to user space, and a loop of a million iterations without any.
fn bench(n: u64) -> Result<(), Error> {
    let code = [
        0xe6, 0x80, // out 0x80, al
        0x66, 0x49, // dec ecx
        0x75, 0xfa, // jnz
        0x66, 0xb9, 0x40, 0x42, 0x0f, 0x00, // mov ecx, 1000000
        0x66, 0x49, // dec ecx
        0x75, 0xfc, // jnz
        0xf4, // hlt
    ];
    let vm = Vm::new(&code)?;
    vm.set_regs(0, 0, n)?;
    let start = Instant::now();
    for _ in 0..n {
        vm.run()?;
    }
    let exits = start.elapsed();
    let start = Instant::now();
    let (reason, _) = vm.run()?;
    println!(
        "{} ns an exit, loop {} us, reason {reason}",
        exits.as_nanos() as u64 / n.max(1),
        start.elapsed().as_micros()
    );
    Ok(())
}

fn main() {
    let n = std::env::args().nth(1).and_then(|a| a.parse().ok());
    let result = hello().and_then(|()| n.map_or(Ok(()), bench));
    match result {
        Ok(()) => println!("KVM-HELLO-OK"),
        Err(e) => println!("KVM-HELLO-FAILED: {e}"),
    }
}
