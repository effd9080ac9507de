//! Tables of checks, and the memory of what passed them: what has not changed need not be checked again.
//!
//! Place in the pipeline: a processor keeps one [`Memo`] and hands it to the functions of [`super`]. Whether a table's checks
//! pass is a function of the fields that the table names, of the mode VM entry begins in, and of the capabilities, which
//! never change. Invariants: tables watch disjoint fields; what reads guest memory is in a table that watches nothing and is
//! run every time.

use twofold_arch::vmx::Field;
use twofold_arch::vmx::field::COUNT;

use super::{Check, Refused, View};

/// Most entries of [`Table::also`].
const ALSO: usize = 6;

/// Checks with what they depend on.
#[derive(Debug)]
pub struct Table {
    /// The checks.
    pub checks: &'static [Check],
    /// Where the memo keeps what it knows of the table; none: it is run every time.
    pub memo: Option<usize>,
    /// Ranges of fields, first and last, that the checks look at and no other table watches.
    pub watch: &'static [(Field, Field)],
    /// Bits of fields that others watch.
    pub also: &'static [(Field, u64)],
}

/// Number of tables with a memo.
const TABLES: usize = 4;

/// What the tables saw when they last passed.
#[derive(Debug)]
pub struct Memo {
    fields: Box<[u64; COUNT]>,
    passed: [Option<Passed>; TABLES],
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Passed {
    also: [u64; ALSO],
    ia32e: bool,
}

impl Default for Memo {
    fn default() -> Self {
        Self { fields: Box::new([0; COUNT]), passed: [None; TABLES] }
    }
}

impl Memo {
    /// Runs the tables whose fields have changed.
    pub(super) fn run(&mut self, v: &View<'_>, tables: &[&Table]) -> Result<(), Refused> {
        for table in tables {
            match table.memo {
                None => run(table, v)?,
                Some(i) => self.run_if_changed(v, table, i)?,
            }
        }
        Ok(())
    }

    fn run_if_changed(&mut self, v: &View<'_>, table: &Table, i: usize) -> Result<(), Refused> {
        let mut now = Passed { also: [0; ALSO], ia32e: v.ia32e };
        for (word, (field, mask)) in now.also.iter_mut().zip(table.also) {
            *word = v.vmcs.get(*field) & mask;
        }
        let fields = v.vmcs.values();
        let same = |(first, last): &(Field, Field)| {
            let range = first.index()..=last.index();
            self.fields[range.clone()] == fields[range]
        };
        if self.passed[i] == Some(now) && table.watch.iter().all(same) {
            return Ok(());
        }
        self.passed[i] = None;
        run(table, v)?;
        for (first, last) in table.watch {
            let range = first.index()..=last.index();
            self.fields[range.clone()].copy_from_slice(&fields[range]);
        }
        self.passed[i] = Some(now);
        Ok(())
    }
}

fn run(table: &Table, v: &View<'_>) -> Result<(), Refused> {
    for check in table.checks {
        if let Err(detail) = (check.run)(v) {
            return Err(Refused { check, detail });
        }
    }
    Ok(())
}
