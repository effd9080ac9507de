//! G3: every check of VM entry, from a valid state by one mutation that fails exactly it, with neighbours that pass.
//!
//! Each file has the checks of the file of the same name. Every capability is on here, implemented or not, so that the
//! checks of a feature are tested before the feature is.

mod controls;
mod guest;
mod host;
mod nonregister;
mod segments;
mod states;

use std::collections::BTreeSet;

use twofold_arch::vmx::{ExitReason, Field, VmError};

use super::{Failed, Memo, Outcome, TABLES, all};
use states::{State, host_32, long, pae, pae_shadow, real, restricted, v86};

/// Tests of checks: the check's name, states that must fail exactly it, states that must pass all.
macro_rules! checks {
    ($($(#[$doc:meta])* $test:ident $name:literal { $(fails $bad:ident: $break:expr;)+ $(passes $good:ident: $keep:expr;)* })*) => {
        /// The checks that this file tests.
        pub(super) const TESTED: &[&str] = &[$($name),*];
        $(
            $(#[$doc])*
            #[test]
            fn $test() {
                $(
                    let mut state = super::states::$bad();
                    let change: fn(&mut super::states::State) = $break;
                    change(&mut state);
                    super::fails_only(&state, $name, stringify!($break));
                )+
                $(
                    let mut state = super::states::$good();
                    let change: fn(&mut super::states::State) = $keep;
                    change(&mut state);
                    super::passes(&state, concat!($name, ": ", stringify!($keep)));
                )*
            }
        )*
    };
}
use checks;

/// The names of all checks that fail, whatever comes before them.
fn failures(state: &State) -> Vec<&'static str> {
    state.with_view(|view| all().filter(|c| (c.run)(view).is_err()).map(|c| c.name).collect())
}

/// What VM entry would do.
fn verdict(state: &State) -> Result<(), Failed> {
    enter(state, &mut Memo::default())
}

fn enter(state: &State, memo: &mut Memo) -> Result<(), Failed> {
    state.with_view(|v| {
        super::controls(v, memo)?;
        super::host(v, memo)?;
        super::guest(v, memo)
    })
}

fn passes(state: &State, what: &str) {
    assert_eq!(failures(state), [""; 0], "{what}");
    assert_eq!(verdict(state), Ok(()), "{what}");
}

fn fails_only(state: &State, name: &str, what: &str) {
    assert_eq!(failures(state), [name], "{what}");
    let failed = verdict(state).expect_err(what);
    assert_eq!(failed.name, name);
    let position = TABLES.iter().position(|t| t.checks.iter().any(|c| c.name == name));
    let expected = if position < Some(2) {
        Outcome::Fail(VmError::EntryControls)
    } else if position == Some(2) {
        Outcome::Fail(VmError::EntryHostState)
    } else {
        let qualification = match name {
            "guest-pdptes" => 2,
            "guest-link-pointer" => 4,
            _ => 0,
        };
        Outcome::Exit { reason: ExitReason::EntryGuestState, qualification }
    };
    assert_eq!(failed.outcome, expected, "{what}");
    let line = failed.to_string();
    assert!(line.contains("; SDM Vol 3C, ") && !line.contains('\n'), "{line}");
}

/// G3: the valid states pass.
#[test]
fn g3_valid_states_pass_every_check() {
    for state in [long(), restricted(), pae(), pae_shadow(), real(), v86(), host_32()] {
        passes(&state, state.what);
    }
}

/// G3: no check without its test, no test without its check, and no name twice.
#[test]
fn g3_every_check_is_tested() {
    let tested: Vec<&str> =
        [controls::TESTED, host::TESTED, guest::TESTED, segments::TESTED, nonregister::TESTED].concat();
    let unique: BTreeSet<&str> = tested.iter().copied().collect();
    let there: Vec<&str> = all().map(|c| c.name).collect();
    assert_eq!(there.iter().copied().collect::<BTreeSet<_>>(), unique);
    assert_eq!((tested.len(), there.len()), (unique.len(), unique.len()));
}

/// G3: the log line names the register, the bit and the rule.
#[test]
fn g3_a_failed_check_is_named_in_words() {
    let mut state = long();
    state.clear(Field::GuestCr4, 1 << 13);
    let line = verdict(&state).unwrap_err().to_string();
    assert_eq!(
        line,
        "guest CR4 0x20 has bit 13 (VMXE) clear that IA32_VMX_CR4_FIXED0 requires; SDM Vol 3C, Checks on Guest Control \
         Registers, Debug Registers, and MSRs"
    );
    let mut state = long();
    state.or(Field::ProcControls, 1 << 0);
    let line = verdict(&state).unwrap_err().to_string();
    assert!(line.contains("primary processor-based VM-execution controls"), "{line}");
    assert!(line.contains("has bit 0 set that IA32_VMX_TRUE_PROCBASED_CTLS forbids"), "{line}");
    let failed = Failed::msr_load(3, "no such MSR".into());
    assert_eq!(failed.outcome, Outcome::Exit { reason: ExitReason::EntryMsrLoading, qualification: 3 });
}

/// G3: MSR areas refuse the MSRs that the SDM names, and reserved bits.
#[test]
fn g3_msr_area_entries() {
    use super::MsrArea::{EntryLoad, ExitLoad, ExitStore};
    for area in [EntryLoad, ExitLoad, ExitStore] {
        assert!(super::msr_entry(area, 0xc000_0081, 0, false).is_ok());
        assert!(super::msr_entry(area, 0xc000_0081, 1, false).is_err());
        assert!(super::msr_entry(area, 0x808, 0, true).is_err());
        assert!(super::msr_entry(area, 0x808, 0, false).is_ok());
    }
    for number in [0xc000_0100, 0xc000_0101, 0x79, 0x8b, 0x9b] {
        assert!(super::msr_entry(EntryLoad, number, 0, false).is_err(), "{number:#x}");
        assert!(super::msr_entry(ExitLoad, number, 0, false).is_err(), "{number:#x}");
    }
    assert!(super::msr_entry(ExitStore, 0xc000_0100, 0, false).is_ok());
    assert!(super::msr_entry(ExitStore, 0x9e, 0, false).is_err());
}

/// A table is run again when one of its fields has changed: its checks look at no others, and no two tables watch the same.
fn looks_only_where_it_says(state: &State) {
    for table in TABLES.iter().filter(|t| t.memo.is_some()) {
        let watched = |f: &Field| {
            table.watch.iter().any(|(first, last)| (first..=last).contains(&f))
                || table.also.iter().any(|(also, _)| also == f)
        };
        let seen: Vec<Field> = state.with_view(|v| {
            table.checks.iter().for_each(|c| drop((c.run)(v)));
            v.seen.borrow().iter().filter(|f| !watched(f)).copied().collect()
        });
        assert_eq!(seen, [], "{}", table.checks[0].name);
    }
}

/// G3: what a memo spares is what has not changed.
#[test]
fn g3_memo_watches_every_field_of_its_checks() {
    let mut owner = std::collections::BTreeMap::new();
    for (i, table) in TABLES.iter().enumerate() {
        for (first, last) in table.watch {
            for field in Field::ALL.iter().filter(|f| (first..=last).contains(f)) {
                assert_eq!(owner.insert(*field, i), None, "{field:?} is watched twice");
            }
        }
    }
    for state in [long(), restricted(), pae(), pae_shadow(), real(), v86(), host_32()] {
        looks_only_where_it_says(&state);
    }
}

/// G3: whatever a VMCS holds, the checks answer, and a memo of earlier entries changes no answer.
#[test]
fn g3_random_vmcs_never_panics() {
    let mut x = 0x9e37_79b9_7f4a_7c15u64;
    let mut next = move || {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        x
    };
    let bases: [fn() -> State; 7] = [long, restricted, pae, pae_shadow, real, v86, host_32];
    let mut failed = BTreeSet::new();
    let mut memo = Memo::default();
    for round in 0..20_000u64 {
        let mut state = bases[(next() % 7) as usize]();
        for _ in 0..1 + round % 40 {
            let field = Field::ALL[(next() % Field::ALL.len() as u64) as usize];
            let value = match next() % 4 {
                0 => next(),
                1 => state.vmcs.get(field) ^ 1 << (next() % 64),
                2 => u64::MAX << (next() % 64),
                _ => next() >> (next() % 64),
            };
            state.vmcs.set(field, value);
        }
        if round % 3 == 0 {
            state.rows(u128::from(next()) << 64 | u128::from(next()));
        }
        // A memo is of one processor.
        let result = if round % 3 == 0 { verdict(&state) } else { enter(&state, &mut memo) };
        assert_eq!(result, verdict(&state));
        if let Err(f) = result {
            failed.insert(f.name);
            assert!(!f.to_string().is_empty());
        }
        looks_only_where_it_says(&state);
    }
    // Many roads to failure have been taken.
    assert!(failed.len() > 40, "{failed:?}");
}
