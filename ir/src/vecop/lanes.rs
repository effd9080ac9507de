//! Lanes of 128-bit values as arrays.
