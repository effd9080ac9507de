//! Branchy interpreters: one bytecode, run by a loop around a `match` and by a table of function pointers.

use crate::mix;
use std::hint::black_box;

/// A register machine: an instruction is an operation and three bytes of operands.
#[derive(Clone, Copy)]
struct Instruction {
    op: u8,
    a: u8,
    b: u8,
    c: u8,
}

const LOAD: u8 = 0;
const MOVE: u8 = 1;
const ADD: u8 = 2;
const SUB: u8 = 3;
const MUL: u8 = 4;
const SHR: u8 = 5;
const AND: u8 = 6;
const JUMP: u8 = 7;
const JUMP_IF_ZERO: u8 = 8;
const JUMP_IF_LESS: u8 = 9;
const PUT: u8 = 10;
const GET: u8 = 11;
const HALT: u8 = 12;

struct Machine {
    r: [u64; 16],
    memory: [u64; 256],
    pc: usize,
    running: bool,
}

impl Machine {
    fn new(n: u64) -> Self {
        let mut r = [0; 16];
        r[1] = n;
        Self { r, memory: [0; 256], pc: 0, running: true }
    }
}

/// Lengths of Collatz chains of 1 to R1, a histogram of them in memory, the sum in R2.
fn collatz() -> Vec<Instruction> {
    let i = |op, a, b, c| Instruction { op, a, b, c };
    vec![
        i(LOAD, 3, 1, 0),          // 0: r3 = 1, the start
        i(LOAD, 10, 1, 0),         // 1: r10 = 1
        i(LOAD, 11, 3, 0),         // 2: r11 = 3
        i(MOVE, 4, 3, 0),          // 3: r4 = r3
        i(LOAD, 5, 0, 0),          // 4: r5 = 0, steps
        i(SUB, 6, 4, 10),          // 5: r6 = r4 - 1
        i(JUMP_IF_ZERO, 6, 15, 0), // 6
        i(ADD, 5, 5, 10),          // 7: r5 += 1
        i(AND, 6, 4, 10),          // 8: r6 = r4 & 1
        i(JUMP_IF_ZERO, 6, 13, 0), // 9
        i(MUL, 4, 4, 11),          // 10
        i(ADD, 4, 4, 10),          // 11: r4 = 3 r4 + 1
        i(JUMP, 0, 5, 0),          // 12
        i(SHR, 4, 4, 10),          // 13: r4 >>= 1
        i(JUMP, 0, 5, 0),          // 14
        i(ADD, 2, 2, 5),           // 15: r2 += r5
        i(GET, 7, 5, 0),           // 16
        i(ADD, 7, 7, 10),          // 17
        i(PUT, 7, 5, 0),           // 18: memory[r5] += 1
        i(ADD, 3, 3, 10),          // 19
        i(JUMP_IF_LESS, 3, 1, 3),  // 20
        i(HALT, 0, 0, 0),          // 21
    ]
}

#[inline(never)]
fn run_switch(code: &[Instruction], m: &mut Machine) {
    loop {
        let i = code[m.pc];
        let (a, b, c) = (usize::from(i.a & 15), usize::from(i.b & 15), usize::from(i.c & 15));
        m.pc += 1;
        match i.op {
            LOAD => m.r[a] = u64::from(i.b),
            MOVE => m.r[a] = m.r[b],
            ADD => m.r[a] = m.r[b].wrapping_add(m.r[c]),
            SUB => m.r[a] = m.r[b].wrapping_sub(m.r[c]),
            MUL => m.r[a] = m.r[b].wrapping_mul(m.r[c]),
            SHR => m.r[a] = m.r[b] >> (m.r[c] & 63),
            AND => m.r[a] = m.r[b] & m.r[c],
            JUMP => m.pc = usize::from(i.b),
            JUMP_IF_ZERO if m.r[a] == 0 => m.pc = usize::from(i.b),
            JUMP_IF_LESS if m.r[a] < m.r[b] => m.pc = usize::from(i.c),
            JUMP_IF_ZERO | JUMP_IF_LESS => {}
            PUT => m.memory[m.r[b] as usize & 255] = m.r[a],
            GET => m.r[a] = m.memory[m.r[b] as usize & 255],
            _ => return,
        }
    }
}

type Handler = fn(&mut Machine, Instruction);

fn operands(i: Instruction) -> (usize, usize, usize) {
    (usize::from(i.a & 15), usize::from(i.b & 15), usize::from(i.c & 15))
}

static HANDLERS: [Handler; 13] = [
    |m, i| m.r[operands(i).0] = u64::from(i.b),
    |m, i| m.r[operands(i).0] = m.r[operands(i).1],
    |m, i| m.r[operands(i).0] = m.r[operands(i).1].wrapping_add(m.r[operands(i).2]),
    |m, i| m.r[operands(i).0] = m.r[operands(i).1].wrapping_sub(m.r[operands(i).2]),
    |m, i| m.r[operands(i).0] = m.r[operands(i).1].wrapping_mul(m.r[operands(i).2]),
    |m, i| m.r[operands(i).0] = m.r[operands(i).1] >> (m.r[operands(i).2] & 63),
    |m, i| m.r[operands(i).0] = m.r[operands(i).1] & m.r[operands(i).2],
    |m, i| m.pc = usize::from(i.b),
    |m, i| {
        if m.r[operands(i).0] == 0 {
            m.pc = usize::from(i.b);
        }
    },
    |m, i| {
        if m.r[operands(i).0] < m.r[operands(i).1] {
            m.pc = usize::from(i.c);
        }
    },
    |m, i| m.memory[m.r[operands(i).1] as usize & 255] = m.r[operands(i).0],
    |m, i| m.r[operands(i).0] = m.memory[m.r[operands(i).1] as usize & 255],
    |m, _| m.running = false,
];

#[inline(never)]
fn run_table(code: &[Instruction], m: &mut Machine) {
    while m.running {
        let i = code[m.pc];
        m.pc += 1;
        HANDLERS[usize::from(i.op)](m, i);
    }
}

fn interpret(units: u64, run: fn(&[Instruction], &mut Machine)) -> Option<u64> {
    let code = black_box(collatz());
    let mut machine = Machine::new(units * 1000);
    run(&code, &mut machine);
    Some(machine.memory.iter().fold(machine.r[2], |sum, &n| mix(sum, n)))
}

pub fn switch(units: u64) -> Option<u64> {
    interpret(units, run_switch)
}

pub fn table(units: u64) -> Option<u64> {
    interpret(units, run_table)
}
