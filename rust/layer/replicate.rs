//! Copies by the largest load per copy, then the heaviest copy first to the lightest device: `DeepSeek`'s published
//! balancer (github.com/deepseek-ai/EPLB), without its second copies on one device, which serve nobody.

use super::{EMPTY, Layer};

/// The expert of every slot of a layer `[P]`, balanced on a single load of every expert `[E]`.
#[must_use]
pub fn replicate(layer: &Layer, load: &[f64]) -> Vec<u16> {
    let (d, slots) = (layer.devices(), layer.slots());
    let filled = layer.room.iter().filter(|&&room| room > 0).count();
    let mut copies = vec![1usize; layer.experts];
    for _ in layer.experts..slots {
        let per_copy = |e: usize| load[e] / copies[e] as f64;
        let more = (0..layer.experts).filter(|&e| copies[e] < filled);
        let Some(e) = more.max_by(|&e, &f| per_copy(e).total_cmp(&per_copy(f)).then(f.cmp(&e))) else {
            break;
        };
        copies[e] += 1;
    }
    let mut items: Vec<u16> = (0..layer.experts).flat_map(|e| vec![e as u16; copies[e]]).collect();
    let weight = |e: u16| load[usize::from(e)] / copies[usize::from(e)] as f64;
    // Copies of one expert stay together, so that the check below is a look at neighbours.
    items.sort_by(|&a, &b| weight(b).total_cmp(&weight(a)).then(a.cmp(&b)));
    let mut expert_in = vec![EMPTY; slots];
    let first: Vec<usize> =
        layer.room.iter().scan(0, |at, &room| Some(std::mem::replace(at, *at + room))).collect();
    let mut used = vec![0; d];
    let mut sum = vec![0.0; d];
    let mut dropped = Vec::new();
    for &e in &items {
        let free = (0..d)
            .filter(|&g| used[g] < layer.room[g] && !expert_in[first[g]..first[g] + used[g]].contains(&e));
        let lightest = free.min_by(|&g, &h| f64::total_cmp(&sum[g], &sum[h]).then(g.cmp(&h)));
        let Some(g) = lightest else {
            dropped.push(e);
            continue;
        };
        expert_in[first[g] + used[g]] = e;
        used[g] += 1;
        sum[g] += weight(e) * f64::from(layer.time[g]);
    }
    expert_in
}
