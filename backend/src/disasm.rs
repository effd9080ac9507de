//! Disassembly of host code for `-d out_asm` and the goldens.
