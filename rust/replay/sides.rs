//! Counts of windows for sides: unions of folds, added up from the counts of their folds.

use rayon::prelude::*;

/// The parts of windows that sides have. Sides with the same part of a window share a row.
#[derive(Debug)]
pub struct Sides {
    /// Rows, in the order of their windows.
    pub rows: Vec<Row>,
    /// The row of every window and side `[W, S]`.
    pub of_side: Vec<u32>,
}

/// The part of a window that a side has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Row {
    /// The window.
    pub window: u32,
    /// Folds of the part, a bit each.
    pub folds: u32,
    /// Tokens of the part.
    pub tokens: u64,
    /// Tokens of the window.
    pub length: u64,
}

/// Window and fold of every cell, in rising order of windows.
#[derive(Debug, Clone, Copy)]
pub struct Cells<'a> {
    /// Window of every cell.
    pub window: &'a [u32],
    /// Fold of every cell.
    pub fold: &'a [u8],
}

impl Sides {
    /// Builds the sides from tokens by window and fold `[W, F]`, and the folds of every side `[S]`, a bit each.
    #[must_use]
    pub fn new(tokens: &[u64], folds: usize, sides: &[u32]) -> Self {
        let mut rows: Vec<Row> = Vec::new();
        let mut of_side = Vec::with_capacity(tokens.len() / folds * sides.len());
        for (window, tokens) in (0..).zip(tokens.chunks_exact(folds)) {
            let first = rows.len();
            let present = tokens.iter().rev().fold(0, |bits, &tokens| bits << 1 | u32::from(tokens > 0));
            let length = tokens.iter().sum();
            for side in sides {
                let folds = present & side;
                let place = rows[first..].iter().position(|row| row.folds == folds);
                let place = place.unwrap_or_else(|| {
                    let members = (0..tokens.len()).filter(|fold| folds >> fold & 1 == 1);
                    rows.push(Row { window, folds, tokens: members.map(|fold| tokens[fold]).sum(), length });
                    rows.len() - 1 - first
                });
                of_side.push((first + place) as u32);
            }
        }
        Self { rows, of_side }
    }

    /// Sums the counts of cells `[C, size]` into a table `[R, size]`, scaled from the part of a row to its window.
    ///
    /// Rows without tokens, and rows that have their window in full, stay as they are.
    pub fn add_up<T: Copy + Into<u64> + Sync>(
        &self,
        cells: Cells<'_>,
        counts: &[T],
        size: usize,
        table: &mut [f64],
    ) {
        table.par_chunks_exact_mut(size).zip(&self.rows).for_each(|(table, row)| {
            if row.tokens == 0 || row.tokens == row.length {
                return;
            }
            table.fill(0.0);
            let first = cells.window.partition_point(|&window| window < row.window);
            let count = cells.window[first..].iter().take_while(|&&window| window == row.window).count();
            let folds = cells.fold[first..][..count].iter();
            for (fold, counts) in folds.zip(counts[first * size..].chunks_exact(size)) {
                if row.folds >> fold & 1 == 1 {
                    table.iter_mut().zip(counts).for_each(|(sum, &count)| *sum += count.into() as f64);
                }
            }
            let scale = row.length as f64 / row.tokens as f64;
            for sum in table {
                *sum *= scale;
            }
        });
    }
}
