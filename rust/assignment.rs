//! The linear assignment problem.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

const NONE: usize = usize::MAX;

/// Returns the column of every row `[n]` in a one-to-one matching with the largest sum of `weight` `[n, n]`.
#[must_use]
pub fn assign_max(weight: &[i64], n: usize) -> Vec<usize> {
    assert_eq!(weight.len(), n * n);
    // Each matching has n weights, so that all of them may be raised alike.
    let least = weight.iter().copied().min().unwrap_or(0);
    let raised = |row: usize| weight[row * n..][..n].iter().map(move |weight| weight - least).enumerate();
    assign_pairs(n, raised)
}

/// Returns the column of every row `[n]` in a one-to-one matching with the largest sum of weights; `pairs` has the columns
/// of a row with their weights of at least 0, in rising order, and all other columns weigh 0 for it.
///
/// The algorithm finds shortest augmenting paths with potentials (Jonker and Volgenant, 1987) in O(n m log m) for m pairs.
/// A path may also end at a row that gives up its column, as it gets one that weighs 0 in the end. The matching is exact in
/// integers, and the same input always gives the same one.
#[must_use]
pub fn assign_pairs<I: Iterator<Item = (usize, i64)>>(n: usize, pairs: impl Fn(usize) -> I) -> Vec<usize> {
    // No weight is larger than the sum of its potentials. A pair that is matched weighs that much, and what is not matched
    // has a potential of 0.
    let mut potential_row: Vec<i64> =
        (0..n).map(|row| pairs(row).map(|(_, weight)| weight).fold(0, i64::max)).collect();
    let (mut potential_column, mut shortest) = (vec![0; n], vec![i64::MAX; n]);
    let [mut row_of, mut column_of, mut before] = std::array::from_fn(|_| vec![NONE; n]);
    for row in 0..n {
        let is_free =
            |&(column, weight): &(usize, i64)| weight == potential_row[row] && row_of[column] == NONE;
        if let Some((column, _)) = pairs(row).find(is_free) {
            (row_of[column], column_of[row]) = (row, column);
        }
    }
    // Rows and columns of a search, the former with the lengths of their paths, and all columns with a length.
    let (mut rows, mut columns, mut reached) = (vec![], vec![], vec![]);
    let mut queue = BinaryHeap::new();
    for start in 0..n {
        if column_of[start] != NONE || potential_row[start] == 0 {
            continue;
        }
        let (mut row, mut path) = (start, 0);
        // The shortest path to a row that gives up its column.
        let (mut least, mut last) = (i64::MAX, start);
        let end = loop {
            rows.push((row, path));
            if path + potential_row[row] < least {
                (least, last) = (path + potential_row[row], row);
            }
            for (column, weight) in pairs(row) {
                let length = path + potential_row[row] + potential_column[column] - weight;
                if length < shortest[column].min(least) {
                    if shortest[column] == i64::MAX {
                        reached.push(column);
                    }
                    (shortest[column], before[column]) = (length, row);
                    // Of columns that are as near, a free one comes first: there the search ends.
                    queue.push(Reverse((length, row_of[column] != NONE, column)));
                }
            }
            // What was pushed before a shorter path was found is stale.
            while queue.peek().is_some_and(|Reverse((length, _, column))| *length > shortest[*column]) {
                queue.pop();
            }
            let nearest = queue.pop().map(|Reverse(nearest)| nearest).filter(|nearest| nearest.0 < least);
            let Some((length, is_taken, column)) = nearest else {
                path = least;
                break std::mem::replace(&mut column_of[last], NONE);
            };
            path = length;
            if !is_taken {
                break column;
            }
            columns.push(column);
            row = row_of[column];
        };
        for (row, length) in rows.drain(..) {
            potential_row[row] -= path - length;
        }
        for column in columns.drain(..) {
            potential_column[column] += path - shortest[column];
        }
        let mut column = end;
        while column != NONE {
            let row = before[column];
            row_of[column] = row;
            column = std::mem::replace(&mut column_of[row], column);
        }
        for column in reached.drain(..) {
            shortest[column] = i64::MAX;
        }
        queue.clear();
    }
    // What remains weighs 0 in any order.
    let mut free = (0..n).filter(|&column| row_of[column] == NONE);
    for column in column_of.iter_mut().filter(|column| **column == NONE) {
        *column = free.next().unwrap_or_default();
    }
    column_of
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Returns the largest sum of weights by trying every order of columns.
    fn largest(weight: &[i64], n: usize, row: usize, taken: u32) -> i64 {
        let open = (0..n).filter(|column| taken >> column & 1 == 0);
        let sums =
            open.map(|column| weight[row * n + column] + largest(weight, n, row + 1, taken | 1 << column));
        if row == n { 0 } else { sums.max().unwrap_or(i64::MIN) }
    }

    /// Draws a size and weights within it.
    fn weights(range: std::ops::Range<i64>) -> impl Strategy<Value = (usize, Vec<i64>)> {
        (0..7usize).prop_flat_map(move |n| (Just(n), prop::collection::vec(range.clone(), n * n)))
    }

    proptest! {
        /// No other order of columns weighs more; a few weights make ties, and many zeros what has no pair.
        #[test]
        fn a_matching_is_as_heavy_as_any((n, weight) in prop_oneof![weights(-9..9), weights(0..3), weights(-1..1)]) {
            let column_of = assign_max(&weight, n);
            let mut columns = column_of.clone();
            columns.sort_unstable();
            prop_assert_eq!(columns, (0..n).collect::<Vec<_>>());
            let sum: i64 = column_of.iter().enumerate().map(|(row, column)| weight[row * n + column]).sum();
            prop_assert_eq!(sum, largest(&weight, n, 0, 0));
        }

        /// Pairs that weigh 0 may be left out.
        #[test]
        fn pairs_that_are_left_out_weigh_nothing((n, weight) in weights(-2..3)) {
            let weight: Vec<i64> = weight.into_iter().map(|weight| weight.max(0)).collect();
            let row = |row: usize| weight[row * n..][..n].iter().copied().enumerate();
            let column_of = assign_pairs(n, |at| row(at).filter(|(_, weight)| *weight > 0));
            let mut columns = column_of.clone();
            columns.sort_unstable();
            prop_assert_eq!(columns, (0..n).collect::<Vec<_>>());
            let sum: i64 = column_of.iter().enumerate().map(|(row, column)| weight[row * n + column]).sum();
            prop_assert_eq!(sum, largest(&weight, n, 0, 0));
        }
    }
}
