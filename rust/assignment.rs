//! The linear assignment problem.

/// Returns the column of every row `[n]` in a one-to-one matching with the largest sum of `weight` `[n, n]`.
///
/// The algorithm finds shortest augmenting paths with potentials (Jonker and Volgenant, 1987) in O(n^3). It is exact in
/// integers, and the same input always gives the same matching.
#[must_use]
pub fn assign_max(weight: &[i64], n: usize) -> Vec<usize> {
    const NONE: usize = usize::MAX;
    assert_eq!(weight.len(), n * n);
    let mut row_of = vec![NONE; n];
    let mut potential_row = vec![0i64; n];
    let mut potential_column = vec![0i64; n];
    let mut shortest = vec![0i64; n];
    let mut before = vec![NONE; n];
    let mut visited = vec![false; n];
    for start in 0..n {
        shortest.fill(i64::MAX);
        before.fill(NONE);
        visited.fill(false);
        let mut row = start;
        let mut path = 0;
        let mut via = NONE;
        let end = loop {
            let mut nearest = i64::MAX;
            let mut next = NONE;
            for column in (0..n).filter(|&c| !visited[c]) {
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
            visited[next] = true;
            if row_of[next] == NONE {
                break next;
            }
            via = next;
            row = row_of[next];
        };
        potential_row[start] += path;
        for column in (0..n).filter(|&c| visited[c] && c != end) {
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
