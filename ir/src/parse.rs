//! Reads a block from the text that [`crate::text`] prints.
//!
//! Values may have any names; they are numbered anew. `;` begins a comment. Only the form is checked here; the
//! rest is [`crate::verify`]'s.

use std::collections::HashMap;
use std::fmt::Debug;

use twofold_arch::{CondCode, Exception, Loc, TbFlags};

use crate::block::{Block, Exit, GuestInsn, IndirectKind, SideExit};
use crate::helper::Helper;
use crate::names;
use crate::op::{BinOp, IntCc, MemFlags, Op, RmwOp, Ty, UnOp, Value};
use crate::text::{MEM_FLAGS, VECTORS, lower};
use crate::vecop::VecOp;

/// Reads one block. The error names the line.
///
/// # Errors
/// When the text is not a block.
pub fn parse(text: &str) -> Result<Block, String> {
    let mut p = Parser::default();
    for (n, line) in text.lines().enumerate() {
        let line = line.split(';').next().unwrap_or("").trim();
        if !line.is_empty() {
            p.line(line).map_err(|e| format!("line {}: {e}: {line}", n + 1))?;
        }
    }
    if !p.begun {
        return Err("no block".into());
    }
    p.block.exits =
        p.exits.into_iter().enumerate().map(|(i, e)| e.ok_or(format!("no exit {i}"))).collect::<Result<_, _>>()?;
    Ok(p.block)
}

#[derive(Default)]
struct Parser<'a> {
    block: Block,
    begun: bool,
    values: HashMap<&'a str, Value>,
    exits: Vec<Option<SideExit>>,
}

/// The words of a line, commas dropped.
struct Words<'a>(std::iter::Peekable<std::vec::IntoIter<&'a str>>);

impl<'a> Words<'a> {
    fn new(line: &'a str) -> Self {
        let words: Vec<&str> = line.split([' ', ',']).filter(|w| !w.is_empty()).collect();
        Self(words.into_iter().peekable())
    }
    fn next(&mut self) -> Result<&'a str, String> {
        self.0.next().ok_or_else(|| "too short".into())
    }
    fn expect(&mut self, word: &str) -> Result<(), String> {
        if self.next()? == word { Ok(()) } else { Err(format!("expected {word}")) }
    }
    fn done(&mut self) -> Result<(), String> {
        self.0.next().map_or(Ok(()), |w| Err(format!("unexpected {w}")))
    }
    fn number<T: TryFrom<i128>>(&mut self) -> Result<T, String> {
        number(self.next()?)
    }
}

fn number<T: TryFrom<i128>>(word: &str) -> Result<T, String> {
    let (negative, digits) = word.strip_prefix('-').map_or((false, word), |w| (true, w));
    let n = match digits.strip_prefix("0x") {
        Some(hex) => i128::from_str_radix(hex, 16),
        None => digits.parse(),
    };
    let n = n.map_err(|_| format!("not a number: {word}"))?;
    T::try_from(if negative { -n } else { n }).map_err(|_| format!("out of range: {word}"))
}

fn ty(word: &str) -> Result<Ty, String> {
    Ty::ALL.into_iter().find(|t| t.to_string() == word).ok_or_else(|| format!("not a type: {word}"))
}

/// The item of an enum with this name.
fn named<T: Copy + Debug>(all: &[T], word: &str) -> Option<T> {
    all.iter().copied().find(|&x| lower(x) == word)
}

impl<'a> Parser<'a> {
    fn line(&mut self, line: &'a str) -> Result<(), String> {
        let mut w = Words::new(line);
        let first = w.next()?;
        match first {
            "block" => {
                self.begun = true;
                w.expect("flags")?;
                self.block.flags = TbFlags(w.number()?);
                w.expect("retired")?;
                self.block.retired = w.number()?;
                self.block.crosses_page = w.0.next_if_eq(&"crosses_page").is_some();
                w.done()
            }
            "insn" => {
                let off = w.number()?;
                w.expect("len")?;
                let first = self.block.ops.len() as u16;
                self.block.insns.push(GuestInsn { off, page: 0, len: w.number()?, first });
                w.done()
            }
            "unused" => {
                let index = w.number()?;
                let side = self.side_exit(&mut w)?;
                self.set_exit(index, side)
            }
            "end" => {
                self.block.end = Some(self.exit(&mut w)?);
                w.done()
            }
            _ => {
                let mut op = first;
                let mut name = None;
                if w.0.next_if_eq(&"=").is_some() {
                    name = Some(first);
                    op = w.next()?;
                }
                let op = self.op(op, &mut w)?;
                w.done()?;
                let v = Value(self.block.ops.len() as u16);
                self.block.ops.push(op);
                match (name, op.result()) {
                    (Some(name), Some(_)) => drop(self.values.insert(name, v)),
                    (None, None) => {}
                    (Some(_), None) => return Err("the op makes no value".into()),
                    (None, Some(_)) => return Err("the value has no name".into()),
                }
                Ok(())
            }
        }
    }

    fn value(&self, w: &mut Words<'a>) -> Result<Value, String> {
        let name = w.next()?;
        self.values.get(name).copied().ok_or_else(|| format!("no value {name}"))
    }
    /// As many values as are left.
    fn values<const N: usize>(&self, w: &mut Words<'a>) -> Result<[Value; N], String> {
        let mut all = [Value::NONE; N];
        for v in &mut all {
            if w.0.peek().is_some() {
                *v = self.value(w)?;
            }
        }
        Ok(all)
    }
    fn loc(w: &mut Words<'a>) -> Result<Loc, String> {
        let name = w.next()?;
        names::loc(name).ok_or_else(|| format!("no place {name}"))
    }

    fn op(&mut self, op: &'a str, w: &mut Words<'a>) -> Result<Op, String> {
        let parts: Vec<&str> = op.split('.').collect();
        Ok(match parts[..] {
            ["nop"] => Op::Nop,
            ["flags"] => Op::Flags,
            ["rip"] => Op::Rip { off: w.number()? },
            ["pair"] => Op::Pair { lo: self.value(w)?, hi: self.value(w)? },
            ["half", part] => {
                let hi = match part {
                    "lo" => false,
                    "hi" => true,
                    _ => return Err(format!("not a half: {part}")),
                };
                Op::Half { a: self.value(w)?, hi }
            }
            ["const", t] => Op::Const { ty: ty(t)?, imm: w.number()? },
            ["get", t] => Op::Get { ty: ty(t)?, loc: Self::loc(w)? },
            ["put", t] => Op::Put { ty: ty(t)?, loc: Self::loc(w)?, v: self.value(w)? },
            ["select", t] => Op::Select { ty: ty(t)?, c: self.value(w)?, a: self.value(w)?, b: self.value(w)? },
            ["zext", t] => Op::Zext { to: ty(t)?, a: self.value(w)? },
            ["sext", t] => Op::Sext { to: ty(t)?, a: self.value(w)? },
            ["trunc", t] => Op::Trunc { to: ty(t)?, a: self.value(w)? },
            ["cond", cc] => {
                let i = CondCode::NAMES.iter().position(|n| *n == cc).ok_or_else(|| format!("no condition {cc}"))?;
                Op::Cond { cc: CondCode::ALL[i] }
            }
            ["cmp", cc, t] => {
                let cc = named(&IntCc::ALL, cc).ok_or_else(|| format!("no comparison {cc}"))?;
                Op::Cmp { cc, ty: ty(t)?, a: self.value(w)?, b: self.value(w)? }
            }
            ["rmw", op, t] => {
                let op = named(&RmwOp::ALL, op).ok_or_else(|| format!("no atomic op {op}"))?;
                Op::Rmw { op, ty: ty(t)?, addr: self.value(w)?, v: self.value(w)? }
            }
            ["cmpxchg", t] => {
                Op::CmpXchg { ty: ty(t)?, addr: self.value(w)?, expected: self.value(w)?, new: self.value(w)? }
            }
            ["load", t, ref flags @ ..] => Op::Load { ty: ty(t)?, flags: mem_flags(flags)?, addr: self.value(w)? },
            ["store", t, ref flags @ ..] => {
                Op::Store { ty: ty(t)?, flags: mem_flags(flags)?, addr: self.value(w)?, v: self.value(w)? }
            }
            ["vec", name] => {
                let op = VecOp::from_name(name).ok_or_else(|| format!("no vector op {name}"))?;
                let imm = w.number()?;
                let [a, b, c] = self.values(w)?;
                Op::Vec { op, imm, a, b, c }
            }
            ["call", name] => {
                let helper = Helper::ALL.iter().copied().find(|h| h.info().name == name);
                Op::Call { helper: helper.ok_or_else(|| format!("no helper {name}"))?, args: self.values(w)? }
            }
            ["exit_if", index] => {
                let index = number(index)?;
                let c = self.value(w)?;
                let side = self.side_exit(w)?;
                self.set_exit(index, side)?;
                Op::ExitIf { c, exit: index }
            }
            [name, t] => {
                let ty = ty(t)?;
                if let Some(op) = named(&BinOp::ALL, name) {
                    Op::Bin { op, ty, a: self.value(w)?, b: self.value(w)? }
                } else if let Some(op) = named(&UnOp::ALL, name) {
                    Op::Un { op, ty, a: self.value(w)? }
                } else {
                    return Err(format!("no op {name}"));
                }
            }
            _ => return Err(format!("no op {op}")),
        })
    }

    fn side_exit(&self, w: &mut Words<'a>) -> Result<SideExit, String> {
        w.expect("retired")?;
        let retired = w.number()?;
        Ok(SideExit { retired, exit: self.exit(w)? })
    }
    fn set_exit(&mut self, index: u16, side: SideExit) -> Result<(), String> {
        if self.exits.len() <= index as usize {
            self.exits.resize(index as usize + 1, None);
        }
        match self.exits[index as usize].replace(side) {
            Some(_) => Err(format!("exit {index} is there already")),
            None => Ok(()),
        }
    }
    fn exit(&self, w: &mut Words<'a>) -> Result<Exit, String> {
        Ok(match w.next()? {
            "jump" => Exit::Jump { off: w.number()? },
            "jump_far" => Exit::JumpFar { off: w.number()? },
            "dispatch" => Exit::Dispatch { off: w.number()? },
            "helped" => Exit::Helped,
            "indirect.jump" => Exit::Indirect { rip: self.value(w)?, kind: IndirectKind::Jump },
            "indirect.call" => Exit::Indirect { rip: self.value(w)?, kind: IndirectKind::Call },
            "indirect.return" => Exit::Indirect { rip: self.value(w)?, kind: IndirectKind::Return },
            "raise" => {
                let off = w.number()?;
                let name = w.next()?;
                let vector = VECTORS.iter().find(|x| x.1 == name).ok_or_else(|| format!("no exception {name}"))?.0;
                let mut exception = Exception { vector, error: None, cr2: 0 };
                if w.0.next_if_eq(&"error").is_some() {
                    exception.error = Some(w.number()?);
                }
                if w.0.next_if_eq(&"cr2").is_some() {
                    exception.cr2 = w.number()?;
                }
                Exit::Raise { off, exception }
            }
            other => return Err(format!("no exit {other}")),
        })
    }
}

fn mem_flags(words: &[&str]) -> Result<MemFlags, String> {
    words.iter().try_fold(MemFlags::NONE, |flags, word| {
        let flag = MEM_FLAGS.iter().find(|x| x.1 == *word).ok_or_else(|| format!("no flag {word}"))?;
        Ok(flags.or(flag.0))
    })
}
