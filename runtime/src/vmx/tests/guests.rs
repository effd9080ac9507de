//! L2 guests that run to an exit: state carried across, intercepts, C1 and G4 and G7.

use twofold_arch::PhysAddr as Pa;

use super::*;

#[test]
fn c1_g4_long_mode_guest_exits_by_cpuid_and_hlt() {
    let mut v = with_guest();
    // mov eax, 0x1234; cpuid; add rax, 1; hlt
    code(&v, &[0xb8, 0x34, 0x12, 0, 0, 0x0f, 0xa2, 0x48, 0x83, 0xc0, 1, 0xf4]);
    assert_eq!(go(&mut v), ExitReason::Cpuid);
    assert_eq!((v.state.rip, v.state.gpr[4], v.state.rflags()), (HANDLER, 0x1_f000, 2));
    assert_eq!((get(&v, Field::GuestRip), get(&v, Field::ExitInstructionLength)), (CODE + 5, 2));
    assert_eq!((get(&v, Field::GuestRsp), v.state.gpr[0]), (STACK, 0x1234));
    assert_eq!(v.state.seg[6].attr & attr::UNUSABLE, attr::UNUSABLE);
    skip(&mut v);
    assert_eq!(go(&mut v), ExitReason::Hlt);
    assert_eq!((v.state.gpr[0], get(&v, Field::GuestRip)), (0x1235, CODE + 11));
    assert_eq!((v.vmx.stats.entries, v.vmx.stats.exits[12]), (2, 1));
}

#[test]
fn g7_c1_real_mode_guest_under_ept() {
    let mut v = with_real_guest();
    // mov ax, 0x5a; out 0x80, al; hlt
    code(&v, &[0xb8, 0x5a, 0x00, 0xe6, 0x80, 0xf4]);
    set_bits(&mut v, Field::ProcControls, proc::UNCONDITIONAL_IO_EXITING);
    assert_eq!(go(&mut v), ExitReason::Io);
    assert_eq!(get(&v, Field::ExitQualification), 0x80 << 16 | 1 << 6);
    assert_eq!((v.state.gpr[0] & 0xffff, get(&v, Field::GuestRip)), (0x5a, 3));
    assert_eq!(v.space.mode, twofold_mmu::PagingMode::Level4);
    assert_eq!((v.space.eptp, v.state.cr0 & cr0::PG), (None, cr0::PG));
    skip(&mut v);
    assert_eq!(go(&mut v), ExitReason::Hlt);
    assert_eq!(get(&v, Field::EntryControls) & u64::from(entry::IA32E_MODE_GUEST), 0);
}

#[test]
fn f2_g4_ept_violation_restarts_the_instruction() {
    let mut v = with_real_guest();
    // 2 MiB pages; the second is not there.
    poke64(&v, EPT + 0x1000, (EPT + 0x2000) | 7);
    poke64(&v, EPT + 0x2000, 7 | 6 << 3 | 1 << 7);
    // mov ds:[0x20], al with DS base 2 MiB.
    code(&v, &[0xa2, 0x20, 0x00, 0xf4]);
    set(&mut v, Field::guest_base(3), 0x1f_fff0);
    set(&mut v, Field::guest_selector(3), 0);
    set(&mut v, Field::GuestCr0, cr0::NE | cr0::ET | cr0::PE);
    set(&mut v, Field::guest_access_rights(7), u64::from(attr::P | 11));
    assert_eq!(go(&mut v), ExitReason::EptViolation);
    assert_eq!(get(&v, Field::GuestPhysicalAddress), 0x20_0010);
    assert_eq!(get(&v, Field::GuestLinearAddress), 0x20_0010);
    assert_eq!(get(&v, Field::ExitQualification) & 0x1bf, 0x182);
    assert_eq!(get(&v, Field::GuestRip), 0);
    assert_eq!(get(&v, Field::GuestRflags) & rflags::RF, rflags::RF);
    poke64(&v, EPT + 0x2008, 0x20_0000 | 7 | 6 << 3 | 1 << 7);
    v.state.gpr[0] = 0x77;
    assert_eq!(go(&mut v), ExitReason::Hlt);
    assert_eq!(peek64(&v, 0x20_0010) & 0xff, 0x77);
    // Write-only: a misconfiguration.
    poke64(&v, EPT + 0x2008, 0x20_0000 | 2 | 6 << 3 | 1 << 7);
    v.mmu.invept(None);
    set(&mut v, Field::GuestRip, 0);
    assert_eq!(go(&mut v), ExitReason::EptMisconfiguration);
    assert_eq!(get(&v, Field::GuestPhysicalAddress), 0x20_0010);
}

#[test]
fn c7_control_register_masks_and_shadows() {
    let mut v = with_guest();
    set(&mut v, Field::Cr0Mask, cr0::TS | cr0::WP);
    set(&mut v, Field::Cr0Shadow, cr0::TS);
    set(&mut v, Field::Cr4Mask, cr4::VMXE);
    // mov rax, cr0; mov rbx, cr4; mov cr0, rax; clts
    code(&v, &[0x0f, 0x20, 0xc0, 0x0f, 0x20, 0xe3, 0x0f, 0x22, 0xc0, 0x0f, 0x06, 0xf4]);
    assert_eq!(go(&mut v), ExitReason::ControlRegister);
    // CLTS with the shadow's TS set exits; everything before did not.
    assert_eq!((get(&v, Field::ExitQualification), get(&v, Field::GuestRip)), (2 << 4, CODE + 9));
    assert_eq!(v.state.gpr[0] & (cr0::TS | cr0::WP), cr0::TS);
    assert_eq!(v.state.gpr[3] & cr4::VMXE, 0);
    // Host-owned bits were not written.
    assert_eq!(get(&v, Field::GuestCr0) & (cr0::TS | cr0::WP), cr0::WP);
    // With the shadow's TS clear CLTS does nothing.
    set(&mut v, Field::Cr0Shadow, 0);
    set(&mut v, Field::GuestRip, CODE + 9);
    assert_eq!(go(&mut v), ExitReason::Hlt);
    // A write that differs from the shadow exits, with the register.
    v.state.gpr[0] = cr0::TS;
    set(&mut v, Field::GuestRip, CODE + 6);
    assert_eq!(go(&mut v), ExitReason::ControlRegister);
    assert_eq!(get(&v, Field::ExitQualification), 0);
}

#[test]
fn c7_cr3_targets() {
    let mut v = with_guest();
    set_bits(&mut v, Field::ProcControls, proc::CR3_LOAD_EXITING);
    // mov cr3, rcx; hlt
    code(&v, &[0x0f, 0x22, 0xd9, 0xf4]);
    v.state.gpr[1] = PML4;
    assert_eq!(go(&mut v), ExitReason::ControlRegister);
    assert_eq!(get(&v, Field::ExitQualification), 3 | 1 << 8);
    set(&mut v, Field::Cr3TargetCount, 2);
    set(&mut v, Field::Cr3Target1, PML4);
    assert_eq!(go(&mut v), ExitReason::Hlt);
}

#[test]
fn g5_io_bitmaps() {
    let mut v = with_guest();
    set_bits(&mut v, Field::ProcControls, proc::IO_BITMAPS | proc::UNCONDITIONAL_IO_EXITING);
    set(&mut v, Field::IoBitmapA, BITMAP);
    set(&mut v, Field::IoBitmapB, BITMAP + 0x1000);
    poke(&v, BITMAP + 0x60 / 8 + 1, &[1 << 2]);
    poke(&v, BITMAP + 0x1000 + 0xfff, &[0x80]);
    // out 0x80, al; mov dx, 0x69; in ax, dx
    code(&v, &[0xe6, 0x80, 0x66, 0xba, 0x69, 0, 0x66, 0xed, 0xf4]);
    assert_eq!(go(&mut v), ExitReason::Io);
    assert_eq!(get(&v, Field::ExitQualification), 1 | 1 << 3 | 0x69 << 16);
    assert_eq!(get(&v, Field::ExitInstructionLength), 2);
    // Port 0xffff, and the access around the top.
    v.state.gpr[2] = 0xffff;
    set(&mut v, Field::GuestRip, CODE + 6);
    poke(&v, BITMAP + 0x1fff, &[0]);
    assert_eq!(go(&mut v), ExitReason::Io);
}

#[test]
fn g5_string_io_has_address_and_information() {
    let mut v = with_guest();
    set_bits(&mut v, Field::ProcControls, proc::UNCONDITIONAL_IO_EXITING);
    // rep outsb
    code(&v, &[0xf3, 0x6e, 0xf4]);
    (v.state.gpr[1], v.state.gpr[2], v.state.gpr[6]) = (3, 0x3f8, 0x1234);
    assert_eq!(go(&mut v), ExitReason::Io);
    assert_eq!(get(&v, Field::ExitQualification), 1 << 4 | 1 << 5 | 0x3f8 << 16);
    assert_eq!(get(&v, Field::GuestLinearAddress), 0x1234);
    assert_eq!(get(&v, Field::ExitInstructionInfo), 2 << 7 | 3 << 15);
    v.state.gpr[1] = 0;
    assert_eq!(go(&mut v), ExitReason::Hlt);
}

#[test]
fn g5_msr_bitmaps() {
    let mut v = with_guest();
    // rdmsr; hlt
    code(&v, &[0x0f, 0x32, 0xf4]);
    v.state.gpr[1] = 0xc000_0081;
    assert_eq!(go(&mut v), ExitReason::Rdmsr);
    set_bits(&mut v, Field::ProcControls, proc::MSR_BITMAPS);
    set(&mut v, Field::MsrBitmap, BITMAP);
    assert_eq!(go(&mut v), ExitReason::Hlt);
    poke(&v, BITMAP + 0x400 + 0x81 / 8, &[1 << 1]);
    set(&mut v, Field::GuestRip, CODE);
    v.state.gpr[1] = 0xc000_0081;
    assert_eq!(go(&mut v), ExitReason::Rdmsr);
    v.state.gpr[1] = 0x4000_0000;
    assert_eq!(go(&mut v), ExitReason::Rdmsr);
    // wrmsr
    code(&v, &[0x0f, 0x30, 0xf4]);
    v.mmu.code().note_write(Pa(CODE), 3);
    crate::exec::slow::drop_written(&mut v);
    v.state.gpr[1] = 0xc000_0082;
    (v.state.gpr[0], v.state.gpr[2]) = (0x1000, 0);
    assert_eq!(go(&mut v), ExitReason::Hlt);
    assert_eq!(v.state.msrs.lstar, 0x1000);
}

#[test]
fn c7_msr_areas() {
    let mut v = with_guest();
    code(&v, &[0xf4]);
    let area = |v: &Vcpu, n: u64, msr: u64, value: u64| {
        poke64(v, AREA + 16 * n, msr);
        poke64(v, AREA + 16 * n + 8, value);
    };
    area(&v, 0, 0xc000_0082, 0x1111);
    area(&v, 16, 0xc000_0082, 0);
    area(&v, 32, 0xc000_0082, 0x3333);
    for (count, address, offset) in [
        (Field::EntryMsrLoadCount, Field::EntryMsrLoadAddress, 0),
        (Field::ExitMsrStoreCount, Field::ExitMsrStoreAddress, 0x100),
        (Field::ExitMsrLoadCount, Field::ExitMsrLoadAddress, 0x200),
    ] {
        set(&mut v, count, 1);
        set(&mut v, address, AREA + offset);
    }
    v.state.msrs.lstar = 0x2222;
    assert_eq!(go(&mut v), ExitReason::Hlt);
    assert_eq!(peek64(&v, AREA + 0x108), 0x1111);
    assert_eq!(v.state.msrs.lstar, 0x3333);
    // An entry that fails: reason 34, its number, and the host's state.
    area(&v, 1, u64::from(twofold_arch::msr::FS_BASE), 0);
    set(&mut v, Field::EntryMsrLoadCount, 2);
    crate::vmx::instructions::vmx(&mut v, word::VMRESUME, 0, 0, NEXT).unwrap();
    assert!(!v.vmx.non_root);
    assert_eq!(get(&v, Field::ExitReason), 34 | 1 << 31);
    assert_eq!((get(&v, Field::ExitQualification), v.state.rip), (2, HANDLER));
    assert_eq!(v.vmx.stats.failures.values().sum::<u64>(), 1);
}

#[test]
fn g3_entry_failure_has_its_qualification_and_loads_the_host() {
    let mut v = with_guest();
    set(&mut v, Field::GuestRflags, 0);
    crate::vmx::instructions::vmx(&mut v, word::VMLAUNCH, 0, 0, NEXT).unwrap();
    assert!(!v.vmx.non_root && !v.vmx.vmcs.launched);
    assert_eq!((get(&v, Field::ExitReason), v.state.rip), (33 | 1 << 31, HANDLER));
}

#[test]
fn c5_e5_with_vpid_nothing_is_flushed() {
    let mut v = with_guest();
    set_bits(&mut v, Field::Proc2Controls, proc2::VPID);
    set(&mut v, Field::Vpid, 7);
    // loop: mov rax, [rsp]; cpuid; jmp loop
    code(&v, &[0x48, 0x8b, 0x04, 0x24, 0x0f, 0xa2, 0xeb, 0xf8]);
    for _ in 0..3 {
        assert_eq!(go(&mut v), ExitReason::Cpuid);
        skip(&mut v);
    }
    let before = v.mmu.stats().misses;
    for _ in 0..10 {
        assert_eq!(go(&mut v), ExitReason::Cpuid);
        skip(&mut v);
    }
    assert_eq!(v.mmu.stats().misses, before);
    // Without VPIDs every transition flushes.
    let proc2 = get(&v, Field::Proc2Controls) & !u64::from(proc2::VPID);
    set(&mut v, Field::Proc2Controls, proc2);
    assert_eq!(go(&mut v), ExitReason::Cpuid);
    assert!(v.mmu.stats().misses > before);
}

#[test]
fn g5_rdtsc_offset() {
    let mut v = with_guest();
    set_bits(&mut v, Field::ProcControls, proc::TSC_OFFSETTING);
    set(&mut v, Field::TscOffset, 1_000_000);
    code(&v, &[0x0f, 0x31, 0xf4]);
    assert_eq!(go(&mut v), ExitReason::Hlt);
    assert_eq!(v.state.gpr[0], 1_000_000 + v.tsc());
    set_bits(&mut v, Field::ProcControls, proc::RDTSC_EXITING);
    set(&mut v, Field::GuestRip, CODE);
    assert_eq!(go(&mut v), ExitReason::Rdtsc);
}

#[test]
fn g4_instructions_that_exit_when_told_to() {
    type Setup = fn(&mut Vcpu);
    let cases: &[(&[u8], ExitReason, u64, Setup)] = &[
        (&[0x0f, 0x08], ExitReason::Invd, 0, |_| {}),
        (&[0x0f, 0x01, 0x38], ExitReason::Invlpg, 0x1234, |v| {
            v.state.gpr[0] = 0x1234;
            set_bits(v, Field::ProcControls, proc::INVLPG_EXITING);
        }),
        (&[0x0f, 0x33], ExitReason::Rdpmc, 0, |v| set_bits(v, Field::ProcControls, proc::RDPMC_EXITING)),
        (&[0x0f, 0x09], ExitReason::Wbinvd, 0, |v| set_bits(v, Field::Proc2Controls, proc2::WBINVD_EXITING)),
        (&[0x0f, 0xc7, 0xf3], ExitReason::Rdrand, 0, |v| set_bits(v, Field::Proc2Controls, proc2::RDRAND_EXITING)),
        (&[0x48, 0x0f, 0xc7, 0xf9], ExitReason::Rdseed, 0, |v| {
            set_bits(v, Field::Proc2Controls, proc2::RDSEED_EXITING)
        }),
        (&[0xf3, 0x90], ExitReason::Pause, 0, |v| set_bits(v, Field::ProcControls, proc::PAUSE_EXITING)),
        (&[0x0f, 0x21, 0xfb], ExitReason::MovDr, 7 | 1 << 4 | 3 << 8, |v| {
            set_bits(v, Field::ProcControls, proc::MOV_DR_EXITING);
        }),
        (&[0x44, 0x0f, 0x20, 0xc1], ExitReason::ControlRegister, 8 | 1 << 4 | 1 << 8, |v| {
            set_bits(v, Field::ProcControls, proc::CR8_STORE_EXITING);
        }),
        (&[0x0f, 0x01, 0xd1], ExitReason::Xsetbv, 0, |v| {
            let cr4 = get(v, Field::GuestCr4) | cr4::OSXSAVE;
            set(v, Field::GuestCr4, cr4);
        }),
        (&[0x0f, 0x01, 0xf9], ExitReason::Rdtscp, 0, |v| {
            set_bits(v, Field::Proc2Controls, proc2::RDTSCP);
            set_bits(v, Field::ProcControls, proc::RDTSC_EXITING);
        }),
    ];
    for (bytes, reason, qualification, setup) in cases {
        let mut v = with_guest();
        code(&v, bytes);
        setup(&mut v);
        assert_eq!(go(&mut v), *reason);
        assert_eq!(get(&v, Field::ExitQualification), *qualification, "{reason:?}");
        assert_eq!(get(&v, Field::ExitInstructionLength), bytes.len() as u64, "{reason:?}");
        assert_eq!(get(&v, Field::GuestRip), CODE);
    }
}

#[test]
fn g4_exits_are_counted_and_timed_by_reason() {
    let mut v = with_guest();
    // cpuid; cpuid; hlt
    code(&v, &[0x0f, 0xa2, 0x0f, 0xa2, 0xf4]);
    for ns in [3_000, 5_000, 70_000] {
        enter(&mut v);
        v.shared.clock.advance(100);
        run_to_exit(&mut v);
        // What L1 does about it.
        v.shared.clock.advance(ns);
        skip(&mut v);
    }
    set(&mut v, Field::GuestRip, CODE + 4);
    assert_eq!(go(&mut v), ExitReason::Hlt);
    let s = v.vmx.stats.json();
    let row = |count, sum: f64, min: f64, max: f64| serde_json::json!({ "count": count, "seconds": sum / 1e9, "min_seconds": min / 1e9, "max_seconds": max / 1e9 });
    assert_eq!(s["exits"]["CPUID"], row(2, 8e3, 3e3, 5e3));
    assert_eq!(s["exits"]["HLT"], row(2, 7e4, 7e4, 7e4));
    assert_eq!((s["entries"].as_u64(), s["guest_seconds"].as_f64()), (Some(4), Some(300.0 / 1e9)));
    // An entry that fails ends the handling of the exit before, and is no time of the guest's.
    v.shared.clock.advance(9_000);
    set(&mut v, Field::GuestRflags, 0);
    crate::vmx::instructions::vmx(&mut v, word::VMRESUME, 0, 0, NEXT).unwrap();
    let s = v.vmx.stats.json();
    assert_eq!(s["exits"]["HLT"], row(2, 79e3, 9e3, 70e3));
    assert_eq!(s["guest_seconds"].as_f64(), Some(300.0 / 1e9));
    // Two processors' together.
    let both = v.vmx.stats.clone().with(&v.vmx.stats).json();
    assert_eq!((&both["exits"]["CPUID"], &both["entries"]), (&row(4, 16e3, 3e3, 5e3), &serde_json::json!(8)));
}

#[test]
fn g4_exits_and_the_faults_of_memory_operands() {
    // lldt [rax+5]; ltr [rax+5]; sldt [rax+5]; lgdt [rax+5]: the exit comes first.
    for bytes in [[0x0f, 0x00, 0x50, 5], [0x0f, 0x00, 0x58, 5], [0x0f, 0x00, 0x40, 5], [0x0f, 0x01, 0x50, 5]] {
        let mut v = with_guest();
        set_bits(&mut v, Field::Proc2Controls, proc2::DESCRIPTOR_TABLE_EXITING);
        set(&mut v, Field::ExceptionBitmap, 1 << 14);
        code(&v, &bytes);
        v.state.gpr[0] = 0x7000_0000;
        let reason = go(&mut v);
        assert!(matches!(reason, ExitReason::LdtrTr | ExitReason::GdtrIdtr), "{bytes:x?}");
        assert_eq!((get(&v, Field::ExitQualification), get(&v, Field::ExitInstructionLength)), (5, 4));
        // Without the control: the fault.
        set(&mut v, Field::Proc2Controls, 0);
        assert_eq!(go(&mut v), ExitReason::ExceptionOrNmi);
        assert_eq!(get(&v, Field::ExitQualification), 0x7000_0005);
    }
    // lmsw [rax]: whether it exits depends on the operand, so the fault comes first.
    let mut v = with_guest();
    set(&mut v, Field::ExceptionBitmap, 1 << 14);
    set(&mut v, Field::Cr0Mask, cr0::TS);
    code(&v, &[0x0f, 0x01, 0x30]);
    v.state.gpr[0] = 0x7000_0000;
    assert_eq!(go(&mut v), ExitReason::ExceptionOrNmi);
    v.state.gpr[0] = AREA + 2;
    poke64(&v, AREA, 0xfff8_0000 | (cr0::TS | cr0::PE) << 16);
    assert_eq!(go(&mut v), ExitReason::ControlRegister);
    assert_eq!(get(&v, Field::ExitQualification), 3 << 4 | 1 << 6 | 0xfff9 << 16);
    assert_eq!(get(&v, Field::GuestLinearAddress), AREA + 2);
}

/// An MTF VM exit follows each iteration of a repeated string instruction, and comes before the single-step trap.
#[test]
fn g5_monitor_trap_flag_and_repeated_strings() {
    let mut v = with_guest();
    set_bits(&mut v, Field::ProcControls, proc::MONITOR_TRAP_FLAG);
    // rep stosb; hlt
    code(&v, &[0xf3, 0xaa, 0xf4]);
    (v.state.gpr[0], v.state.gpr[1], v.state.gpr[7]) = (0x5a, 3, AREA);
    for left in [2, 1, 0] {
        assert_eq!(go(&mut v), ExitReason::MonitorTrapFlag);
        assert_eq!(v.state.gpr[1], left);
        assert_eq!(peek64(&v, AREA) & 0xff_ffff, [0x5a_5a5a, 0x5a5a, 0x5a][left as usize]);
    }
    assert_eq!(get(&v, Field::GuestRip), CODE + 2);
    // nop under TF: the exit finds the step pending, and entry delivers it.
    code(&v, &[0x90, 0xf4]);
    v.mmu.code().note_write(Pa(CODE), 3);
    crate::exec::slow::drop_written(&mut v);
    set(&mut v, Field::GuestRip, CODE);
    set(&mut v, Field::GuestRflags, 2 | rflags::TF);
    set(&mut v, Field::ExceptionBitmap, 1 << 1);
    assert_eq!(go(&mut v), ExitReason::MonitorTrapFlag);
    assert_eq!((get(&v, Field::GuestRip), get(&v, Field::GuestPendingDebug)), (CODE + 1, 1 << 14));
    assert_eq!(go(&mut v), ExitReason::ExceptionOrNmi);
    assert_eq!((get(&v, Field::ExitQualification), get(&v, Field::GuestPendingDebug)), (1 << 14, 0));
    assert_eq!(get(&v, Field::GuestRip), CODE + 1);
}

/// G3: an area of more MSRs than IA32_VMX_MISC recommends fails at the first one too many.
#[test]
fn g3_msr_area_too_long() {
    let mut v = with_guest();
    for n in 0..513 {
        poke64(&v, 0x13_0000 + 16 * n, 0xc000_0082);
    }
    set(&mut v, Field::EntryMsrLoadAddress, 0x13_0000);
    set(&mut v, Field::EntryMsrLoadCount, 513);
    crate::vmx::instructions::vmx(&mut v, word::VMLAUNCH, 0, 0, NEXT).unwrap();
    assert_eq!((get(&v, Field::ExitReason), get(&v, Field::ExitQualification)), (34 | 1 << 31, 513));
    set(&mut v, Field::EntryMsrLoadCount, 512);
    code(&v, &[0xf4]);
    assert_eq!(go(&mut v), ExitReason::Hlt);
}
