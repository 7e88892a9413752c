//! What sides of folds have of windows, added up from what each fold has of them.

use rayon::prelude::*;

/// Windows, and what sides have of each: where several sides have the same, it is one row.
#[derive(Debug)]
pub struct Sides {
    /// Rows, in the order of their windows.
    pub rows: Vec<Row>,
    /// The row of every window and side `[W, S]`.
    pub of_side: Vec<u32>,
}

/// What a side has of a window.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Row {
    /// The window.
    pub window: u32,
    /// Which folds it has, a bit each.
    pub folds: u32,
    /// Its tokens.
    pub tokens: u64,
    /// Tokens of the window.
    pub length: u64,
}

/// Which cell is of which window, rising, and of which fold.
#[derive(Debug, Clone, Copy)]
pub struct Cells<'a> {
    /// The window of every cell.
    pub window: &'a [u32],
    /// Its fold.
    pub fold: &'a [u8],
}

impl Sides {
    /// Takes tokens by window and fold `[W, F]`, and the folds of every side, a bit each.
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
                    let own = (0..tokens.len()).filter(|fold| folds >> fold & 1 == 1);
                    rows.push(Row { window, folds, tokens: own.map(|fold| tokens[fold]).sum(), length });
                    rows.len() - 1 - first
                });
                of_side.push((first + place) as u32);
            }
        }
        Self { rows, of_side }
    }

    /// Writes a table `[R, size]` of rows that have a part of their window, by what `counts` `[C, size]` of cells say, as
    /// if the part were the whole window. Other rows stay as they are.
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
            let own = cells.window[first..].iter().take_while(|&&window| window == row.window).count();
            for (fold, counts) in
                cells.fold[first..][..own].iter().zip(counts[first * size..].chunks_exact(size))
            {
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
