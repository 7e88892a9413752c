//! Counts by window, in the narrowest type that holds them.
//!
//! A trace has thousands of windows, and of most nothing is counted any more: only those that are still open take
//! 64 bits a count.

use std::ops::{AddAssign, Range};

use crate::error::{Result, room_for};

/// Counts of one unsigned type.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Narrow {
    /// Below 2^8.
    U8(Vec<u8>),
    /// Below 2^16.
    U16(Vec<u16>),
    /// Below 2^32.
    U32(Vec<u32>),
    /// All others.
    U64(Vec<u64>),
}

/// Runs `$body` with `$all` as the counts, whatever their type is.
macro_rules! of_any_type {
    ($counts:expr, $all:ident => $body:expr) => {
        match $counts {
            Narrow::U8($all) => $body,
            Narrow::U16($all) => $body,
            Narrow::U32($all) => $body,
            Narrow::U64($all) => $body,
        }
    };
}
pub(crate) use of_any_type;

impl Narrow {
    /// Builds so many zeros, of a type that holds counts up to `largest`.
    pub(crate) fn zeros(largest: u64, len: usize) -> Self {
        match largest {
            0..=0xFF => Self::U8(vec![0; len]),
            0x100..=0xFFFF => Self::U16(vec![0; len]),
            0x1_0000..=0xFFFF_FFFF => Self::U32(vec![0; len]),
            _ => Self::U64(vec![0; len]),
        }
    }

    /// Builds so many zeros of the same type.
    pub(crate) fn zeros_like(&self, len: usize) -> Self {
        Self::zeros(u64::MAX >> (64 - 8 * self.width()), len)
    }

    /// Returns the bytes of a count.
    pub(crate) fn width(&self) -> usize {
        fn width<T>(_: &[T]) -> usize {
            size_of::<T>()
        }
        of_any_type!(self, all => width(all))
    }

    /// Adds counts at the end, which are none of them above what was promised.
    fn extend(&mut self, counts: &[u64]) {
        let counts = counts.iter().copied();
        match self {
            Self::U8(all) => all.extend(counts.map(|count| count as u8)),
            Self::U16(all) => all.extend(counts.map(|count| count as u16)),
            Self::U32(all) => all.extend(counts.map(|count| count as u32)),
            Self::U64(all) => all.extend(counts),
        }
    }

    /// Returns some columns `[rows, layers, columns]` of the `tables` `[rows, size]` of all layers, which have one type.
    pub(crate) fn columns<const N: usize>(
        tables: &[Self],
        rows: usize,
        size: usize,
        columns: &[Range<usize>; N],
    ) -> [Self; N] {
        columns.each_ref().map(|columns| {
            let mut all = tables[0].zeros_like(0);
            of_any_type!(&mut all, all => {
                all.reserve_exact(rows * tables.len() * columns.len());
                for row in 0..rows {
                    for table in tables {
                        all.extend_from_slice(&Count::slice(table)[row * size..][columns.clone()]);
                    }
                }
            });
            all
        })
    }
}

/// A type of counts.
pub(crate) trait Count: Copy + AddAssign + From<u8> {
    /// Adds a count; the sum is not above what was promised.
    fn add(&mut self, count: u64);

    /// Returns the counts of a table of this type.
    fn slice(table: &Narrow) -> &[Self];
}

macro_rules! counts {
    ($($type:ty: $kind:ident),*) => {
        $(impl Count for $type {
            #[inline(always)]
            fn add(&mut self, count: u64) {
                *self += count as $type;
            }

            fn slice(table: &Narrow) -> &[Self] {
                match table {
                    Narrow::$kind(all) => all,
                    _ => unreachable!("tables are of one type"),
                }
            }
        })*
    };
}
counts!(u8: U8, u16: U16, u32: U32, u64: U64);

/// Counts by window: runs of `length` tokens, or the whole trace.
#[derive(Debug)]
pub(crate) struct WindowCounts {
    pub(crate) length: Option<u64>,
    pub(crate) tokens: u64,
    /// Counts of a layer in a window.
    size: usize,
    /// Windows that are full `[windows, layers, size]`, and how many there are.
    full: Narrow,
    closed: usize,
    /// Later windows of every layer `[windows, size]`.
    pub(crate) counts: Vec<Vec<u64>>,
}

impl WindowCounts {
    /// Builds windows without tokens, each of which will add at most `per_token` to a count.
    pub(crate) fn new(layers: usize, size: usize, length: Option<u64>, per_token: usize) -> Self {
        let largest = length.map_or(u64::MAX, |length| length.saturating_mul(per_token as u64));
        Self {
            length,
            tokens: 0,
            size,
            full: Narrow::zeros(largest, 0),
            closed: 0,
            counts: vec![Vec::new(); layers],
        }
    }

    /// Refuses so many more tokens if their windows, and a copy of them in the end, are more than memory can hold.
    pub(crate) fn room_for(&self, tokens: usize) -> Result<()> {
        let added_windows = self.length.map_or(1, |length| (tokens as u64).div_ceil(length)) as usize;
        let tokens = self.tokens.saturating_add(tokens as u64);
        let windows = self.length.map_or(1, |length| tokens.div_ceil(length).max(1)) as usize;
        let (layers, size) = (self.counts.len(), self.size);
        // Tables grow by doubling.
        room_for("windows", &[windows, layers, size, 3 * self.full.width()])?;
        room_for("windows", &[added_windows.saturating_add(1), layers, size, 2 * size_of::<u64>()])
    }

    /// Returns the number of windows, at least one.
    pub(crate) fn number(&self) -> usize {
        self.length.map_or(1, |length| self.tokens.div_ceil(length).max(1)) as usize
    }

    /// Returns the position of the next token, counted from the first one of the windows that are open.
    pub(crate) fn begin(&self) -> u64 {
        self.tokens - self.length.map_or(0, |length| self.closed as u64 * length)
    }

    /// Adds tokens that were counted, and closes the windows that they have filled.
    pub(crate) fn advance(&mut self, tokens: u64) {
        self.tokens += tokens;
        if let Some(length) = self.length {
            self.close((self.tokens / length) as usize);
        }
    }

    /// Closes all windows before this one.
    fn close(&mut self, end: usize) {
        let size = self.size;
        for window in 0..end - self.closed {
            for counts in &mut self.counts {
                if counts.len() < (window + 1) * size {
                    counts.resize((window + 1) * size, 0);
                }
                self.full.extend(&counts[window * size..][..size]);
            }
        }
        for counts in &mut self.counts {
            counts.drain(..(end - self.closed) * size);
        }
        self.closed = end;
    }

    /// Returns all counts, `[windows, layers, size]`.
    pub(crate) fn finish(mut self) -> Narrow {
        self.close(self.number());
        self.full
    }
}

/// Gives `visit` each run of a block's tokens that share a window, and the window's counts.
///
/// The block's `tokens` tokens begin with token `first` of the open windows; `counts`, `[windows so far, size]`, grows.
pub(crate) fn by_window(
    length: Option<u64>,
    first: u64,
    tokens: usize,
    size: usize,
    counts: &mut Vec<u64>,
    mut visit: impl FnMut(Range<usize>, &mut [u64]),
) {
    let mut from = 0;
    while from < tokens {
        let token = first + from as u64;
        let (window, tokens_left) = length.map_or((0, u64::MAX), |n| (token / n, n - token % n));
        let to = tokens.min(from.saturating_add(usize::try_from(tokens_left).unwrap_or(usize::MAX)));
        let end = (window as usize + 1) * size;
        if counts.len() < end {
            counts.resize(end, 0);
        }
        visit(from..to, &mut counts[end - size..end]);
        from = to;
    }
}
