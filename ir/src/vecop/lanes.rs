//! Lanes of a 128-bit value as arrays, and the maps over them that most ops are.
//!
//! Lane 0 is the least significant. All on arrays of fixed size, so that the compiler makes host vector code of the loops.

/// An integer that a 128-bit value holds lanes of.
pub(super) trait Lane: Copy + Default {
    /// Array of all lanes.
    type All: AsRef<[Self]> + AsMut<[Self]> + Copy;
    /// The lanes of `v`.
    fn split(v: u128) -> Self::All;
    /// The value of these lanes.
    fn join(l: Self::All) -> u128;
}

macro_rules! lane {
    ($($t:ident $n:literal $bytes:literal;)*) => {$(
        impl Lane for $t {
            type All = [$t; $n];
            fn split(v: u128) -> [$t; $n] {
                let bytes = v.to_le_bytes();
                let mut out = [0; $n];
                for (o, c) in out.iter_mut().zip(bytes.chunks_exact($bytes)) {
                    let mut word = [0; $bytes];
                    word.copy_from_slice(c);
                    *o = $t::from_le_bytes(word);
                }
                out
            }
            fn join(l: [$t; $n]) -> u128 {
                let mut bytes = [0; 16];
                for (c, x) in bytes.chunks_exact_mut($bytes).zip(l) {
                    c.copy_from_slice(&x.to_le_bytes());
                }
                u128::from_le_bytes(bytes)
            }
        }
    )*};
}
lane! { u8 16 1; i8 16 1; u16 8 2; i16 8 2; u32 4 4; i32 4 4; u64 2 8; i64 2 8; }

/// `f` of each lane.
pub(super) fn map<L: Lane>(a: u128, f: impl Fn(L) -> L) -> u128 {
    let mut l = L::split(a);
    for x in l.as_mut() {
        *x = f(*x);
    }
    L::join(l)
}

/// `f` of each pair of lanes.
pub(super) fn zip<L: Lane>(a: u128, b: u128, f: impl Fn(L, L) -> L) -> u128 {
    let mut l = L::split(a);
    let r = L::split(b);
    for (x, y) in l.as_mut().iter_mut().zip(r.as_ref()) {
        *x = f(*x, *y);
    }
    L::join(l)
}

/// A value whose lane `i` is `f(i)`.
pub(super) fn make<L: Lane>(f: impl Fn(usize) -> L) -> u128 {
    let mut l = L::split(0);
    for (i, x) in l.as_mut().iter_mut().enumerate() {
        *x = f(i);
    }
    L::join(l)
}
