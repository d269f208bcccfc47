// Second of two launches of `sample`: a threadgroup a row finds the smallest score that is kept, and draws.
// It reads again only chunks whose maximum says that they matter.
// logits, scores [rows, V] (scores where ADJUSTED)  stats, histogram: of sample_scan
// temperature, top_k, top_p, min_p, uniform, greedy [rows]  →  chosen, raw, logprob, probability [rows]
// template T, V, CHUNKS, BLOCKS, ADJUSTED
constexpr uint WINDOW = 1024;
threadgroup float scratch[3][32];
threadgroup float chunk_mass[CHUNKS];
threadgroup float block_best[BLOCKS];
// The histogram of the row, as sums from the best bin on; `fine` is the same of 256 parts of a bin.
threadgroup uint count_to[256];
threadgroup float mass_to[256];
threadgroup uint fine_count_to[256];
threadgroup float fine_mass_to[256];
threadgroup atomic_uint fine[512];
threadgroup uint count_part[8];
threadgroup float mass_part[8];
// Scores of some bins, then sorted, with the sums of their weights.
threadgroup float window[WINDOW];
threadgroup float sorted[WINDOW];
threadgroup float weight_to[WINDOW];
threadgroup atomic_uint length[1];
const uint row = threadgroup_position_in_grid.x;
const uint thread_index = thread_position_in_threadgroup.x;
const uint threads = threads_per_threadgroup.x;
const uint lane = thread_index_in_simdgroup;
const uint simdgroup = simdgroup_index_in_threadgroup;
const uint simdgroups = threads / 32;
const size_t row_start = size_t(row) * V;
const size_t stats_start = size_t(row) * CHUNKS * 4;
const float t = usable(temperature[row]);
const bool is_greedy = greedy[row] != 0 || !is_temperature(temperature[row]);
const bool has_k = !is_greedy && top_k[row] > 0 && top_k[row] < V;
const bool has_p = !is_greedy && top_p[row] < 1.0f;

// --- What the row sums up to.
float raw_best = -3e38f;
float best = -3e38f;
for (uint c = thread_index; c < uint(CHUNKS); c += threads) {
  raw_best = metal::max(raw_best, stats[stats_start + c * 4]);
  best = metal::max(best, stats[stats_start + c * 4 + 2]);
}
raw_best = group_max(raw_best, scratch[0], lane, simdgroup, simdgroups);
best = group_max(best, scratch[1], lane, simdgroup, simdgroups);
float raw_total = 0.0f;
for (uint c = thread_index; c < uint(CHUNKS); c += threads)
  raw_total += stats[stats_start + c * 4 + 1] * metal::exp(stats[stats_start + c * 4] - raw_best);
raw_total = group_sum(raw_total, scratch[2], lane, simdgroup, simdgroups);

// --- The smallest score that top-k and then top-p keep.
float lowest = -SCORE_LIMIT;
if (has_k || has_p) {
  const float units = DEFICIT_UNITS;
  for (uint k = thread_index; k < uint(BLOCKS); k += threads) {
    float top = -3e38f;
    for (uint c = k * 8; c < metal::min(k * 8 + 8, uint(CHUNKS)); c++) top = metal::max(top, stats[stats_start + c * 4 + 2]);
    block_best[k] = top;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  // The upper edge of a bin, from the best score on.
  const float first_edge = (1.0f - bin_fraction(best)) * 0.125f;
  uint bin_count = 0;
  float bin_mass = 0.0f;
  if (thread_index < 255) {
    uint bin_deficit = 0;
    for (uint k = 0; k < uint(BLOCKS); k++) {
      const uint bin = thread_index - bins_below(best, block_best[k]);  // of the block; wraps if the block has it not
      if (bin < 256) {
        bin_count += histogram[(size_t(row) * BLOCKS + k) * 512 + bin];
        bin_deficit += histogram[(size_t(row) * BLOCKS + k) * 512 + 256 + bin];
      }
    }
    bin_mass = (float(bin_count) - float(bin_deficit) / units) * metal::exp(first_edge - float(thread_index) * 0.125f);
  }
  sums_to(bin_count, bin_mass, count_to, mass_to, count_part, mass_part, thread_index, lane, simdgroup);
  // The last bin is all that lies 31 and more under the best: it has no mass to speak of, and top-p does not cut it.
  if (thread_index == 0) count_to[255] = uint(V);
  threadgroup_barrier(mem_flags::mem_threadgroup);
  float kept_mass = mass_to[255];
  uint window_first = 1;
  uint window_last = 0;
  uint before_count = 0;
  float before_mass = 0.0f;
  uint size = 0;
  for (int query = 0; query < 2; query++) {
    if (query == 0 ? !has_k : !has_p) continue;
    const uint k = uint(top_k[row]);
    const float mass = top_p[row] * kept_mass;
    const uint bin = query == 0 ? first_reaching(count_to, k) : part_reaching(count_to, mass_to, mass);
    if (query == 1 && bin == 255) continue;
    uint overflow = 0;
    if (bin < window_first || bin > window_last) {
      // Take the bin with all above it if they are few, else the bin alone, else ever finer parts of it: of the places
      // [start, start + 2^bits) one of 256 parts at a time, so that four times always do.
      const bool few = count_to[bin] <= WINDOW;
      window_first = few ? 0 : bin;
      window_last = bin;
      before_count = few || bin == 0 ? 0 : count_to[bin - 1];
      before_mass = few || bin == 0 ? 0.0f : mass_to[bin - 1];
      uint inside = count_to[bin] - before_count;
      const float best_edge = metal::floor(best * 8.0f);
      uint start = place_of((best_edge + 1.0f - float(bin)) * 0.125f);
      uint bits = bits_of(place_of(bin < 255 ? (best_edge - float(bin)) * 0.125f : -SCORE_LIMIT) - start);
      bool refined = false;
      for (int level = 0; level < 4; level++) {
        if (inside <= WINDOW || bits == 0) break;
        const uint shift = bits > 8 ? bits - 8 : 0;
        window_first = 1;  // such a window serves no other query
        window_last = 0;
        for (uint i = thread_index; i < 512; i += threads) atomic_store_explicit(&fine[i], 0u, memory_order_relaxed);
        threadgroup_barrier(mem_flags::mem_threadgroup);
        for (uint c = simdgroup; c < uint(CHUNKS); c += simdgroups) {
          if (metal::min(bins_below(best, stats[stats_start + c * 4 + 2]), 255u) > bin) continue;
          for (int n = 0; n < 16; n++) {
            const uint i = c * 512 + uint(n) * 32 + lane;
            if (i >= uint(V)) continue;
            const float z = ADJUSTED ? scores[row_start + i] : scaled_score(float(logits[row_start + i]), t);
            const uint part = (place_of(z) - start) >> shift;
            if (metal::min(bins_below(best, z), 255u) != bin || part > 255) continue;
            atomic_fetch_add_explicit(&fine[part], 1u, memory_order_relaxed);
            atomic_fetch_add_explicit(&fine[256 + part], deficit(z, units), memory_order_relaxed);
          }
        }
        threadgroup_barrier(mem_flags::mem_threadgroup);
        const uint part_count = atomic_load_explicit(&fine[thread_index & 255u], memory_order_relaxed);
        const float part_deficit = float(atomic_load_explicit(&fine[256 + (thread_index & 255u)], memory_order_relaxed));
        sums_to(part_count, (float(part_count) - part_deficit / units) * metal::exp(first_edge - float(bin) * 0.125f),
                fine_count_to, fine_mass_to, count_part, mass_part, thread_index, lane, simdgroup);
        const uint part = query == 0 ? first_reaching(fine_count_to, k - before_count)
                                     : part_reaching(fine_count_to, fine_mass_to, mass - before_mass);
        inside = fine_count_to[part] - (part > 0 ? fine_count_to[part - 1] : 0u);
        before_count += part > 0 ? fine_count_to[part - 1] : 0u;
        before_mass += part > 0 ? fine_mass_to[part - 1] : 0.0f;
        start += part << shift;
        bits = shift;
        refined = true;
      }
      if (thread_index == 0) atomic_store_explicit(&length[0], 0u, memory_order_relaxed);
      threadgroup_barrier(mem_flags::mem_threadgroup);
      for (uint c = simdgroup; c < uint(CHUNKS); c += simdgroups) {
        if (metal::min(bins_below(best, stats[stats_start + c * 4 + 2]), 255u) > bin) continue;
        for (int n = 0; n < 16; n++) {
          const uint i = c * 512 + uint(n) * 32 + lane;
          if (i >= uint(V)) continue;
          const float z = ADJUSTED ? scores[row_start + i] : scaled_score(float(logits[row_start + i]), t);
          const uint below = metal::min(bins_below(best, z), 255u);
          if (below > bin || (!few && below < bin) || (refined && (place_of(z) - start) >> bits != 0)) continue;
          const uint at = atomic_fetch_add_explicit(&length[0], 1u, memory_order_relaxed);
          if (at < WINDOW) window[at] = z;
        }
      }
      threadgroup_barrier(mem_flags::mem_threadgroup);
      const uint taken = atomic_load_explicit(&length[0], memory_order_relaxed);
      const uint held = metal::min(taken, WINDOW);
      overflow = taken - held;  // of equal scores, more than the window holds
      size = held;
      for (uint i = thread_index; i < held; i += threads) {
        const float z = window[i];
        uint rank = 0;
        for (uint j = 0; j < held; j++) rank += window[j] > z || (window[j] == z && j < i) ? 1 : 0;
        sorted[rank] = z;
      }
      threadgroup_barrier(mem_flags::mem_threadgroup);
      if (simdgroup == 0) {
        float carry = before_mass;
        for (uint first = 0; first < held; first += 32) {
          const uint i = first + lane;
          const float sum = carry + metal::simd_prefix_inclusive_sum(i < held ? metal::exp(sorted[i] - best) : 0.0f);
          if (i < held) weight_to[i] = sum;
          carry = metal::simd_broadcast(sum, ushort(31));
        }
      }
      threadgroup_barrier(mem_flags::mem_threadgroup);
    }
    if (query == 0) {
      // Those of the window that score as much as the k-th, and so are kept with it. All are equal where it overflows.
      lowest = sorted[metal::max(metal::min(k - before_count, size), 1u) - 1];
      uint last = 0;
      for (uint step = WINDOW / 2; step > 0; step >>= 1) last += last + step < size && sorted[last + step] >= lowest ? step : 0;
      kept_mass = weight_to[last] + float(overflow) * metal::exp(lowest - best);
    } else {
      // The last of those before which there is less than `mass`.
      uint last = 0;
      for (uint step = WINDOW / 2; step > 0; step >>= 1) last += last + step < size && weight_to[last + step - 1] < mass ? step : 0;
      lowest = metal::max(lowest, sorted[last]);
    }
  }
}
if (min_p[row] > 0.0f) lowest = metal::max(lowest, best + metal::log(min_p[row]));
const bool cut = is_greedy || lowest > -SCORE_LIMIT;
lowest = is_greedy ? best : metal::min(metal::max(lowest, best - 87.0f), best);
if (best <= -SCORE_LIMIT) lowest = INFINITY;  // no token has a score: none is kept

// --- The mass that each chunk keeps.
for (uint c = simdgroup; c < uint(CHUNKS); c += simdgroups) {
  const float top = stats[stats_start + c * 4 + 2];
  float mass = top >= lowest ? stats[stats_start + c * 4 + 3] * metal::exp(top - best) : 0.0f;
  if (cut) {
    mass = 0.0f;
    if (top >= lowest) {
      for (int n = 0; n < 16; n++) {
        const uint i = c * 512 + uint(n) * 32 + lane;
        if (i >= uint(V)) continue;
        const float z = ADJUSTED ? scores[row_start + i] : scaled_score(float(logits[row_start + i]), t);
        mass += z >= lowest ? metal::exp(z - best) : 0.0f;
      }
    }
    mass = metal::simd_sum(mass);
  }
  if (lane == 0) chunk_mass[c] = mass;
}
threadgroup_barrier(mem_flags::mem_threadgroup);
if (simdgroup > 0) return;

// --- The draw: the first token, in the order of the vocabulary, at which the sum goes beyond uniform · total.
float total = 0.0f;
for (uint c = lane; c < uint(CHUNKS); c += 32) total += chunk_mass[c];
total = metal::simd_sum(total);
float target = is_greedy ? 0.0f : (uniform[row] > 0.0f ? metal::min(uniform[row], 1.0f) : 0.0f) * total;
uint chunk = uint(CHUNKS);
uint last_chunk = 0;
float before = 0.0f;
float carry = 0.0f;
for (uint first = 0; first < uint(CHUNKS) && chunk == uint(CHUNKS); first += 32) {
  const uint c = first + lane;
  const float mass = c < uint(CHUNKS) ? chunk_mass[c] : 0.0f;
  const float sum = carry + metal::simd_prefix_inclusive_sum(mass);
  chunk = metal::simd_min(mass > 0.0f && sum > target ? c : uint(CHUNKS));
  last_chunk = metal::max(last_chunk, metal::simd_max(mass > 0.0f ? c : 0u));
  before = metal::simd_sum(c == chunk ? sum - mass : 0.0f);
  carry = metal::simd_broadcast(sum, ushort(31));
}
if (chunk == uint(CHUNKS)) {  // rounding, or a number of 1: the last of all
  chunk = last_chunk;
  target = INFINITY;
}
uint token = uint(V);
uint latest = 0;  // one more than the last that is kept: in this chunk there is one, where there is any at all
float weight = 0.0f;
for (int n = 0; n < 16 && token == uint(V); n++) {
  const uint i = chunk * 512 + uint(n) * 32 + lane;
  float z = -SCORE_LIMIT;
  if (i < uint(V)) z = ADJUSTED ? scores[row_start + i] : scaled_score(float(logits[row_start + i]), t);
  const float mass = z >= lowest ? metal::exp(z - best) : 0.0f;
  const float sum = before + metal::simd_prefix_inclusive_sum(mass);
  token = metal::simd_min(mass > 0.0f && sum > target ? i : uint(V));
  const uint last = metal::simd_max(mass > 0.0f ? i + 1 : 0u);
  const uint wanted = token < uint(V) ? token + 1 : last;
  if (wanted > 0) {
    latest = wanted;
    weight = metal::simd_sum(i + 1 == wanted ? mass : 0.0f);
  }
  before = metal::simd_broadcast(sum, ushort(31));
}
if (lane == 0) {
  const uint picked = metal::max(latest, 1u) - 1;
  const float logit = float(logits[row_start + picked]);
  chosen[row] = int(picked);
  raw[row] = logit;
  logprob[row] = finite_logit(logit) - raw_best - metal::log(raw_total);
  probability[row] = total > 0.0f ? (is_greedy ? 1.0f : weight / total) : 0.0f;
}
