//! Visits of expert sets: expected, where copies share the tokens of an expert and are chosen independently.
//!
//! Sums run over the sets in their order, layer by layer, so that they are the same on any number of threads; with one
//! copy of each expert they are sums of whole numbers, and exact.

use rayon::prelude::*;

use crate::error::{Error, Result};

/// Expert sets of a layer.
#[derive(Debug, Clone, Copy)]
pub struct Sets<'a> {
    /// Experts of every set `[N, K]`.
    pub ids: &'a [u16],
    /// Tokens of every set `[N]`.
    pub counts: &'a [u64],
}

/// Tokens that visit a unit: what serves each expert, and what was met of the set at hand.
#[derive(Debug)]
struct Visits {
    /// Units that serve an expert, and the share that they do not serve; one expert after the other.
    missed: Vec<(u32, f64)>,
    /// Where an expert begins in `missed` `[E + 1]`.
    first: Vec<usize>,
    /// Tokens of every unit.
    tokens: Vec<f64>,
    /// Share of the set's tokens that miss a unit, where the set meets it: see `met`.
    rest: Vec<f64>,
    /// Units that the set meets.
    met: Vec<u32>,
}

impl Visits {
    /// Of shares `[units, E]`.
    fn new(share: &[f64], experts: usize) -> Self {
        let units = share.len() / experts;
        let (mut missed, mut first) = (Vec::with_capacity(experts), vec![0]);
        for e in 0..experts {
            let serves = |&unit: &usize| share[unit * experts + e] != 0.0;
            missed
                .extend((0..units).filter(serves).map(|unit| (unit as u32, 1.0 - share[unit * experts + e])));
            first.push(missed.len());
        }
        Self { missed, first, tokens: vec![0.0; units], rest: vec![f64::NAN; units], met: Vec::new() }
    }

    fn add(&mut self, set: &[u16], count: f64) {
        for &e in set {
            let e = usize::from(e);
            for &(unit, missed) in &self.missed[self.first[e]..self.first[e + 1]] {
                let rest = &mut self.rest[unit as usize];
                if rest.is_nan() {
                    self.met.push(unit);
                    *rest = missed;
                } else {
                    *rest *= missed;
                }
            }
        }
        for unit in self.met.drain(..) {
            let rest = std::mem::replace(&mut self.rest[unit as usize], f64::NAN);
            self.tokens[unit as usize] += count * (1.0 - rest);
        }
    }
}

/// Tokens that visit every device `[L, D]` and every node `[L, N]`, of sets of every layer.
///
/// A device takes shares `[L, D, E]` of the tokens of its experts; nodes `[D]` are numbered from 0.
pub fn visits(
    share: &[f64],
    experts: usize,
    node: &[u16],
    sets: &[Sets<'_>],
) -> Result<(Vec<f64>, Vec<f64>)> {
    let (devices, nodes) = (node.len(), node.iter().max().map_or(0, |&node| usize::from(node) + 1));
    let known = |of: &Sets<'_>| {
        let k = of.ids.len() / of.counts.len().max(1);
        k * of.counts.len() == of.ids.len() && of.ids.iter().all(|&e| usize::from(e) < experts)
    };
    if share.len() != sets.len() * devices * experts || share.iter().any(|share| share.is_nan()) {
        let rule = format!("shares [{}, {devices}, {experts}]", sets.len());
        return Err(Error::Shape { what: "share", rule, found: format!("{} values", share.len()) });
    }
    if !sets.par_iter().all(known) {
        let rule = format!("ids [N, K] below {experts} and counts [N]");
        return Err(Error::Shape { what: "sets", rule, found: "others".into() });
    }
    let layer = |(share, of): (&[f64], &Sets<'_>)| {
        let mut of_nodes = vec![0.0; nodes * experts];
        for (share, &node) in share.chunks_exact(experts).zip(node) {
            for (sum, share) in of_nodes[usize::from(node) * experts..].iter_mut().zip(share) {
                *sum += share;
            }
        }
        let (mut devices, mut nodes) = (Visits::new(share, experts), Visits::new(&of_nodes, experts));
        let k = (of.ids.len() / of.counts.len().max(1)).max(1);
        for (set, &count) in of.ids.chunks_exact(k).zip(of.counts) {
            devices.add(set, count as f64);
            nodes.add(set, count as f64);
        }
        (devices.tokens, nodes.tokens)
    };
    let each = (devices * experts).max(1);
    let found: Vec<_> = share.par_chunks_exact(each).zip(sets).map(layer).collect();
    let (devices, nodes): (Vec<_>, Vec<_>) = found.into_iter().unzip();
    Ok((devices.concat(), nodes.concat()))
}

#[cfg(test)]
// Costs are sums of whole numbers.
#[allow(clippy::float_cmp)]
mod tests {
    use super::*;

    #[test]
    fn copies_are_chosen_independently() {
        // Expert 0 on both devices of node 0, expert 1 on device 1, expert 2 on device 2 of node 1.
        let share = [[0.5, 0.0, 0.0], [0.5, 1.0, 0.0], [0.0, 0.0, 1.0]].concat();
        let sets = Sets { ids: &[0, 2, 0, 1], counts: &[10, 100] };
        let (devices, nodes) = visits(&share, 3, &[0, 0, 1], &[sets]).expect("valid");
        assert_eq!(devices, [55.0, 105.0, 10.0]);
        assert_eq!(nodes, [110.0, 10.0]);
    }

    #[test]
    fn what_is_not_there_is_refused() {
        let sets = |ids| Sets { ids, counts: &[1] };
        assert!(visits(&[1.0, 1.0], 2, &[0], &[sets(&[1])]).is_ok());
        assert!(visits(&[1.0, 1.0], 2, &[0], &[sets(&[2])]).is_err());
        assert!(visits(&[1.0, 1.0], 1, &[0], &[sets(&[0])]).is_err());
        assert!(visits(&[1.0, f64::NAN], 2, &[0], &[sets(&[0])]).is_err());
        let (devices, nodes) = visits(&[1.0], 1, &[0], &[Sets { ids: &[], counts: &[] }]).expect("valid");
        assert_eq!((devices, nodes), (vec![0.0], vec![0.0]));
    }
}
