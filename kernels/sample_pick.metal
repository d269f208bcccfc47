// Second of two launches of `sample`: a threadgroup a row finds the smallest score that is kept, and draws.
// It reads again only chunks whose maximum says that they matter.
// logits, scores [rows, V] (scores where ADJUSTED)  stats, histogram: of sample_scan
// temperature, top_k, top_p, min_p, uniform, greedy [rows]  →  chosen, raw, logprob, probability [rows]
// template T, V, CHUNKS, BLOCKS, ADJUSTED
threadgroup float scratch[3][32];
threadgroup float chunk_mass[CHUNKS];
threadgroup int block_bin[BLOCKS];
// The histogram of the row, as sums from the best bin on; `fine` is the same of one bin's 256 parts.
threadgroup uint count_to[256];
threadgroup float mass_to[256];
threadgroup uint fine_count_to[256];
threadgroup float fine_mass_to[256];
threadgroup atomic_uint fine[512];
threadgroup uint count_part[8];
threadgroup float mass_part[8];
// Scores of some bins, then sorted, with the sums of their weights.
threadgroup float window[1024];
threadgroup float sorted[1024];
threadgroup float weight_to[1024];
threadgroup atomic_uint length[1];
threadgroup uint found[1];
const uint row = threadgroup_position_in_grid.x;
const uint thread_index = thread_position_in_threadgroup.x;
const uint threads = threads_per_threadgroup.x;
const uint lane = thread_index_in_simdgroup;
const uint simdgroup = simdgroup_index_in_threadgroup;
const uint simdgroups = threads / 32;
const size_t start = size_t(row) * V;
const size_t stats_start = size_t(row) * CHUNKS * 4;
const float t = temperature[row];
const bool is_greedy = greedy[row] != 0;
const bool has_k = !is_greedy && uint(top_k[row]) - 1u < uint(V) - 1u;  // 0 is off
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
  const int best_bin = score_bin(best);
  for (uint k = thread_index; k < uint(BLOCKS); k += threads) {
    float block_best = -3e38f;
    for (uint c = k * 8; c < metal::min(k * 8 + 8, uint(CHUNKS)); c++)
      block_best = metal::max(block_best, stats[stats_start + c * 4 + 2]);
    block_bin[k] = score_bin(block_best);
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  uint bin_count = 0;
  float bin_mass = 0.0f;
  if (thread_index < 256) {
    for (uint k = 0; k < uint(BLOCKS); k++) {
      const uint bin = thread_index - uint(best_bin - block_bin[k]);  // of the block; beyond 255 if the block has it not
      if (bin < 256) {
        bin_count += histogram[(size_t(row) * BLOCKS + k) * 512 + bin];
        bin_mass += float(histogram[(size_t(row) * BLOCKS + k) * 512 + 256 + bin]);
      }
    }
    bin_mass *= metal::exp(float(best_bin + 1 - int(thread_index)) * 0.125f - best) * (1.0f / 262144.0f);
  }
  sums_to(bin_count, bin_mass, count_to, mass_to, count_part, mass_part, thread_index, lane, simdgroup);
  // What lies in the last bin or below it, 31 and more under the best, has no mass to speak of: it is not cut.
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
    const uint bin = query == 0 ? first_count(count_to, k) : first_mass(mass_to, mass);
    if (bin >= 255) continue;
    uint overflow = 0;
    if (bin < window_first || bin > window_last) {
      // Take the bin with all above it if they are few, else the bin alone, else ever finer parts of it.
      uint shift = 24;
      uint prefix = 0;
      const bool few = count_to[bin] <= 1024;
      window_first = few ? 0 : bin;
      window_last = bin;
      before_count = few || bin == 0 ? 0 : count_to[bin - 1];
      before_mass = few || bin == 0 ? 0.0f : mass_to[bin - 1];
      uint inside = count_to[bin] - before_count;
      const float edge = float(best_bin + 1 - int(bin)) * 0.125f;
      while (inside > 1024 && shift > 0) {
        shift -= 8;
        window_first = 1;  // such a window serves no other query
        window_last = 0;
        for (uint i = thread_index; i < 512; i += threads) atomic_store_explicit(&fine[i], 0u, memory_order_relaxed);
        threadgroup_barrier(mem_flags::mem_threadgroup);
        for (uint c = simdgroup; c < uint(CHUNKS); c += simdgroups) {
          if (stats[stats_start + c * 4 + 2] < edge - 0.125f) continue;
          for (int n = 0; n < 16; n++) {
            const uint i = c * 512 + uint(n) * 32 + lane;
            if (i >= uint(V)) continue;
            const float z = ADJUSTED ? scores[start + i] : scaled_score(float(logits[start + i]), t);
            const uint place = bin_place(z);
            if (uint(best_bin - score_bin(z)) != bin || (shift < 16 && place >> (shift + 8) != prefix)) continue;
            const uint part = (place >> shift) & 255u;
            atomic_fetch_add_explicit(&fine[part], 1u, memory_order_relaxed);
            atomic_fetch_add_explicit(&fine[256 + part], uint(metal::rint(metal::exp(z - edge) * 16384.0f)), memory_order_relaxed);
          }
        }
        threadgroup_barrier(mem_flags::mem_threadgroup);
        const uint part_count = thread_index < 256 ? atomic_load_explicit(&fine[thread_index & 255u], memory_order_relaxed) : 0u;
        const float part_mass =
            thread_index < 256 ? float(atomic_load_explicit(&fine[256 + (thread_index & 255u)], memory_order_relaxed)) : 0.0f;
        sums_to(part_count, part_mass * (metal::exp(edge - best) * (1.0f / 16384.0f)), fine_count_to, fine_mass_to, count_part,
                mass_part, thread_index, lane, simdgroup);
        const uint part = metal::min(query == 0 ? first_count(fine_count_to, k - before_count)
                                                : first_mass(fine_mass_to, mass - before_mass), 255u);
        inside = fine_count_to[part] - (part > 0 ? fine_count_to[part - 1] : 0u);
        before_count += part > 0 ? fine_count_to[part - 1] : 0u;
        before_mass += part > 0 ? fine_mass_to[part - 1] : 0.0f;
        prefix = prefix << 8 | part;
      }
      if (thread_index == 0) atomic_store_explicit(&length[0], 0u, memory_order_relaxed);
      threadgroup_barrier(mem_flags::mem_threadgroup);
      for (uint c = simdgroup; c < uint(CHUNKS); c += simdgroups) {
        if (stats[stats_start + c * 4 + 2] < edge - 0.125f) continue;
        for (int n = 0; n < 16; n++) {
          const uint i = c * 512 + uint(n) * 32 + lane;
          if (i >= uint(V)) continue;
          const float z = ADJUSTED ? scores[start + i] : scaled_score(float(logits[start + i]), t);
          const uint below = uint(best_bin - score_bin(z));
          if (below > bin || (!few && below < bin) || (shift < 24 && bin_place(z) >> shift != prefix)) continue;
          const uint at = atomic_fetch_add_explicit(&length[0], 1u, memory_order_relaxed);
          if (at < 1024) window[at] = z;
        }
      }
      threadgroup_barrier(mem_flags::mem_threadgroup);
      size = metal::min(atomic_load_explicit(&length[0], memory_order_relaxed), 1024u);
      overflow = inside - size;  // more equal scores than the window holds
      for (uint i = thread_index; i < size; i += threads) {
        const float z = window[i];
        uint rank = 0;
        for (uint j = 0; j < size; j++) rank += window[j] > z || (window[j] == z && j < i) ? 1 : 0;
        sorted[rank] = z;
      }
      threadgroup_barrier(mem_flags::mem_threadgroup);
      if (simdgroup == 0) {
        float carry = before_mass;
        for (uint i = lane; i < (size + 31) / 32 * 32; i += 32) {
          const float sum = carry + metal::simd_prefix_inclusive_sum(i < size ? metal::exp(sorted[i] - best) : 0.0f);
          if (i < size) weight_to[i] = sum;
          carry = metal::simd_broadcast(sum, ushort(31));
        }
      }
      threadgroup_barrier(mem_flags::mem_threadgroup);
    }
    if (query == 0) {
      uint i = metal::min(k - before_count, size) - 1;
      lowest = sorted[i];
      while (i + 1 < size && sorted[i + 1] == lowest) i++;
      kept_mass = weight_to[i] + float(overflow) * metal::exp(lowest - best);
    } else {
      // The last of those before which there is less than `mass`.
      uint low = 0;
      uint high = size - 1;
      while (low < high) {
        const uint middle = (low + high + 1) / 2;
        if (weight_to[middle - 1] < mass) low = middle;
        else high = middle - 1;
      }
      lowest = metal::max(lowest, sorted[low]);
    }
  }
}
if (min_p[row] > 0.0f) lowest = metal::max(lowest, best + metal::log(min_p[row]));
const bool cut = is_greedy || lowest > -SCORE_LIMIT;
lowest = is_greedy ? best : metal::max(lowest, best - 87.0f);

// --- The mass that each chunk keeps.
for (uint c = simdgroup; c < uint(CHUNKS); c += simdgroups) {
  const float top = stats[stats_start + c * 4 + 2];
  float mass = stats[stats_start + c * 4 + 3] * metal::exp(top - best);
  if (cut) {
    mass = 0.0f;
    if (top >= lowest) {
      for (int n = 0; n < 16; n++) {
        const uint i = c * 512 + uint(n) * 32 + lane;
        if (i >= uint(V)) continue;
        const float z = ADJUSTED ? scores[start + i] : scaled_score(float(logits[start + i]), t);
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
const float target = is_greedy ? 0.0f : uniform[row] * total;
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
if (chunk == uint(CHUNKS)) {  // rounding: the last of all
  chunk = last_chunk;
  before = target;
}
uint token = uint(V);
uint last_token = 0;
float weight = 0.0f;
for (int n = 0; n < 16 && token == uint(V); n++) {
  const uint i = chunk * 512 + uint(n) * 32 + lane;
  float z = -SCORE_LIMIT;
  if (i < uint(V)) z = ADJUSTED ? scores[start + i] : scaled_score(float(logits[start + i]), t);
  const float mass = z >= lowest ? metal::exp(z - best) : 0.0f;
  const float sum = before + metal::simd_prefix_inclusive_sum(mass);
  token = metal::simd_min(mass > 0.0f && sum > target ? i : uint(V));
  const uint latest = metal::simd_max(mass > 0.0f ? i : 0u);
  const uint wanted = token < uint(V) ? token : latest;
  if (wanted > 0 || token == 0) {
    last_token = wanted;
    weight = metal::simd_sum(i == wanted ? mass : 0.0f);
  }
  before = metal::simd_broadcast(sum, ushort(31));
}
if (lane == 0) {
  const uint picked = token < uint(V) ? token : last_token;
  const float logit = float(logits[start + picked]);
  chosen[row] = int(picked);
  raw[row] = logit;
  logprob[row] = logit - (raw_best + metal::log(raw_total));
  probability[row] = is_greedy ? 1.0f : weight / total;
}
