//! The shortest path through choices of layers: a cost is one of each layer and one of neighbouring layers.

/// The shortest path through the choices of all layers: its cost, and its choices; ties go to the earlier one.
///
/// Takes what every choice costs by itself, and `step`: from the least costs up to the layer before, for every choice
/// of a layer the least cost up to there, without its own, and the choice it comes from. None if there is none.
pub(super) fn shortest(
    own: &[Vec<i64>],
    step: impl Fn(usize, &[i64]) -> Option<Vec<(i64, u32)>>,
) -> Option<(i64, Vec<usize>)> {
    let mut value = own.first()?.clone();
    let mut came_from = Vec::with_capacity(own.len());
    for (l, own) in own.iter().enumerate().skip(1) {
        let best = step(l, &value)?;
        value = best.iter().zip(own).map(|(&(cost, _), own)| cost + own).collect();
        came_from.push(best);
    }
    let mut choice = (0..value.len()).min_by_key(|&b| (value[b], b))?;
    let cost = value[choice];
    let mut chosen = vec![choice];
    for best in came_from.iter().rev() {
        choice = best[choice].1 as usize;
        chosen.push(choice);
    }
    chosen.reverse();
    Some((cost, chosen))
}
