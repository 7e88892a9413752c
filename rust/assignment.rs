//! The linear assignment problem.

/// Matches rows to columns one to one for the largest sum of `weight`, `[n, n]`.
///
/// Returns the column of every row. Shortest augmenting paths with potentials (Jonker and Volgenant, 1987), O(n^3),
/// exact in integers; the same input always gives the same matching.
#[must_use]
pub fn assign_max(weight: &[i64], n: usize) -> Vec<usize> {
    const NONE: usize = usize::MAX;
    assert_eq!(weight.len(), n * n);
    let mut row_of = vec![NONE; n];
    let mut potential_row = vec![0i64; n];
    let mut potential_column = vec![0i64; n];
    let mut shortest = vec![0i64; n];
    let mut before = vec![NONE; n];
    let mut done = vec![false; n];
    for start in 0..n {
        shortest.fill(i64::MAX);
        before.fill(NONE);
        done.fill(false);
        let mut row = start;
        let mut path = 0;
        let mut via = NONE;
        let end = loop {
            let mut nearest = i64::MAX;
            let mut next = NONE;
            for column in (0..n).filter(|&c| !done[c]) {
                // Cost is the negated weight.
                let reduced = -weight[row * n + column] - potential_row[row] - potential_column[column];
                if path + reduced < shortest[column] {
                    shortest[column] = path + reduced;
                    before[column] = via;
                }
                if shortest[column] < nearest {
                    nearest = shortest[column];
                    next = column;
                }
            }
            path = nearest;
            done[next] = true;
            if row_of[next] == NONE {
                break next;
            }
            via = next;
            row = row_of[next];
        };
        potential_row[start] += path;
        for column in (0..n).filter(|&c| done[c] && c != end) {
            potential_row[row_of[column]] += path - shortest[column];
            potential_column[column] -= path - shortest[column];
        }
        let mut column = end;
        while before[column] != NONE {
            row_of[column] = row_of[before[column]];
            column = before[column];
        }
        row_of[column] = start;
    }
    let mut column_of = vec![0; n];
    for (column, &row) in row_of.iter().enumerate() {
        column_of[row] = column;
    }
    column_of
}
