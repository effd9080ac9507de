//! A small VMM: boots a bzImage and an initramfs under /dev/kvm, with the guest's serial console on stdout.
//!
//! It runs in L1. `kvm-linux --kernel FILE [--initrd FILE] [--append TEXT] [--memory MIB] [--timeout S] [--mark TEXT]`
//! prints `kvm-linux: start`, the guest's console, when a line with TEXT first came, and how it ended. A guest ends by
//! writing its status to port 0xf4, or by a reset through the keyboard controller (`reboot=k`); anything else is an error,
//! named in one line with the registers.

mod devices;
mod load;
mod processor;

use devices::{Devices, End};
use kvm_bindings::{kvm_pit_config, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use load::Image;
use std::fmt::Display;
use std::process::ExitCode;
use std::rc::Rc;
use std::time::Instant;
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

/// Where KVM may put the task-state segment and the page table it needs without unrestricted guest, below the APICs.
const TSS: usize = 0xfffb_d000;
const IDENTITY_MAP: u64 = 0xfffb_c000;

/// What the command line says.
pub struct Options {
    kernel: String,
    initrd: Option<String>,
    append: String,
    memory: usize,
    timeout: u32,
    mark: Option<String>,
}

/// Puts what was tried in front of why it failed.
pub fn because<E: Display>(what: &str) -> impl FnOnce(E) -> String {
    move |e| format!("{what}: {e}")
}

fn options() -> Result<Options, String> {
    let mut o = Options {
        kernel: String::new(),
        initrd: None,
        append: "console=ttyS0".to_owned(),
        memory: 256 << 20,
        timeout: 60,
        mark: None,
    };
    let mut args = std::env::args().skip(1);
    while let Some(arg) = args.next() {
        let value = args.next().ok_or_else(|| format!("{arg} needs a value"))?;
        let number = || value.parse::<u32>().map_err(because(&arg));
        match arg.as_str() {
            "--kernel" => o.kernel = value,
            "--initrd" => o.initrd = Some(value),
            "--append" => o.append = value,
            "--memory" => o.memory = number()? as usize * (1 << 20),
            "--timeout" => o.timeout = number()?,
            "--mark" => o.mark = Some(value),
            _ => return Err(format!("unknown argument {arg}")),
        }
    }
    if o.kernel.is_empty() { Err("--kernel is missing".to_owned()) } else { Ok(o) }
}

/// A virtual machine with memory, KVM's own interrupt controllers and timer.
fn machine(kvm: &Kvm, memory: &GuestMemoryMmap<()>) -> Result<VmFd, String> {
    let vm = kvm.create_vm().map_err(because("KVM_CREATE_VM"))?;
    vm.set_identity_map_address(IDENTITY_MAP).map_err(because("KVM_SET_IDENTITY_MAP_ADDR"))?;
    vm.set_tss_address(TSS).map_err(because("KVM_SET_TSS_ADDR"))?;
    vm.create_irq_chip().map_err(because("KVM_CREATE_IRQCHIP"))?;
    vm.create_pit2(kvm_pit_config { flags: 1, ..Default::default() }).map_err(because("KVM_CREATE_PIT2"))?;
    let host = memory.get_host_address(GuestAddress(0)).map_err(because("memory"))?;
    let region = kvm_userspace_memory_region {
        slot: 0,
        flags: 0,
        guest_phys_addr: 0,
        memory_size: memory.last_addr().0 + 1,
        userspace_addr: host as u64,
    };
    devices::give_memory(&vm, region).map_err(because("KVM_SET_USER_MEMORY_REGION"))?;
    Ok(vm)
}

/// Where the guest is, for a line that says what went wrong.
fn state(vcpu: &VcpuFd) -> String {
    let (Ok(r), Ok(s)) = (vcpu.get_regs(), vcpu.get_sregs()) else { return "no registers".to_owned() };
    format!(
        "RIP {:#x} RSP {:#x} RAX {:#x} CR0 {:#x} CR2 {:#x} CR3 {:#x} CR4 {:#x} EFER {:#x} CS {:#x}",
        r.rip, r.rsp, r.rax, s.cr0, s.cr2, s.cr3, s.cr4, s.efer, s.cs.selector
    )
}

/// Runs the processor until the guest ends: its exit status.
fn run(vcpu: &mut VcpuFd, devices: &mut Devices) -> Result<u8, String> {
    loop {
        let problem = match vcpu.run() {
            Ok(VcpuExit::IoOut(port, data)) => match devices.write(port, data) {
                Some(End::Status(status)) => return Ok(status),
                Some(End::Reset) => return Ok(0),
                None => continue,
            },
            Ok(VcpuExit::IoIn(port, data)) => {
                devices.read(port, data);
                continue;
            }
            // Nothing is there: reads give ones.
            Ok(VcpuExit::MmioRead(_, data)) => {
                data.fill(0xff);
                continue;
            }
            Ok(VcpuExit::MmioWrite(..)) => continue,
            Ok(VcpuExit::Shutdown) => "the guest shut down (triple fault)".to_owned(),
            Ok(VcpuExit::InternalError) => "KVM internal error".to_owned(),
            Ok(VcpuExit::FailEntry(reason, _)) => format!("VM entry failed, reason {reason:#x}"),
            Ok(exit) => format!("unexpected exit {exit:?}"),
            Err(e) if e.errno() == libc::EINTR => "timeout".to_owned(),
            Err(e) => format!("KVM_RUN: {e}"),
        };
        devices.flush();
        let detail = processor::internal_error(vcpu);
        return Err(format!("{problem}{detail}; {}", state(vcpu)));
    }
}

fn boot() -> Result<u8, String> {
    let o = options()?;
    let kvm = Kvm::new().map_err(because("/dev/kvm"))?;
    let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), o.memory)]).map_err(because("memory"))?;
    let image = Image::read(&o)?;
    println!("kvm-linux: start");
    let start = Instant::now();
    let entry = image.load(&memory, &o.append)?;
    let vm = Rc::new(machine(&kvm, &memory)?);
    let mut vcpu = vm.create_vcpu(0).map_err(because("KVM_CREATE_VCPU"))?;
    processor::set_up(&kvm, &vcpu, &memory, &entry)?;
    let mut devices = Devices::new(Rc::clone(&vm), start, o.mark);
    devices::limit_time(o.timeout);
    let status = run(&mut vcpu, &mut devices)?;
    devices.flush();
    println!("kvm-linux: guest ended with status {status} after {:.3} s", start.elapsed().as_secs_f64());
    Ok(status)
}

fn main() -> ExitCode {
    match boot() {
        Ok(status) => ExitCode::from(status),
        Err(why) => {
            println!("kvm-linux: error: {why}");
            ExitCode::FAILURE
        }
    }
}
