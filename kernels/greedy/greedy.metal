// The likeliest token of each row: one threadgroup reads its logits once. The sum of e^logit as it goes (Milakov and
// Gimelshein, 2018). Of equal logits the first is taken.
// logits [rows, V]  →  chosen int32, raw, logprob, probability float32 [rows]; a row that holds a NaN or +∞: 0, and raw NaN
// template T, V below 2²⁴, DEPTH: logits that a thread has under way at once
threadgroup float scratch[4][32];
const uint row = threadgroup_position_in_grid.x;
const uint thread_index = thread_position_in_threadgroup.x;
const uint threads = threads_per_threadgroup.x;
const uint lane = thread_index_in_simdgroup;
const uint simdgroup = simdgroup_index_in_threadgroup;
const uint simdgroups = threads / 32;
const size_t start = size_t(row) * V;
float best = -INFINITY;
uint where = uint(V);
float top = -3e38f;
float sum = 0.0f;
bool unsound = false;
for (uint i = thread_index; i < uint(V); i += threads * DEPTH) {
  float z[DEPTH];
  float new_top = top;
  for (int n = 0; n < DEPTH; n++) {
    const uint at = i + uint(n) * threads;
    z[n] = at < uint(V) ? float(logits[start + at]) : -INFINITY;
    unsound = unsound || !(z[n] < INFINITY);
    new_top = metal::max(new_top, z[n]);
    if (at < uint(V) && (where == uint(V) || z[n] > best)) {
      best = z[n];
      where = at;
    }
  }
  sum *= metal::exp(top - new_top);
  for (int n = 0; n < DEPTH; n++) sum += metal::exp(z[n] - new_top);
  top = new_top;
}
const float row_best = group_max(best, scratch[0], lane, simdgroup, simdgroups);
// Exact as floats; a thread that has the best has the first of its own.
const float first = group_max(best == row_best && where < uint(V) ? -float(where) : -float(V), scratch[1], lane, simdgroup, simdgroups);
const bool none = first == -float(V);  // all are −∞
const float row_top = none ? -3e38f : row_best;
const float total = group_sum(sum * metal::exp(top - row_top), scratch[2], lane, simdgroup, simdgroups);
const float marks = group_max(unsound ? 1.0f : 0.0f, scratch[3], lane, simdgroup, simdgroups);
if (thread_index == 0) {
  chosen[row] = marks > 0.0f || none ? 0 : int(-first);
  raw[row] = marks > 0.0f ? as_type<float>(0x7fc00000u) : none ? -INFINITY : row_best;
  logprob[row] = row_best - row_top - metal::log(total);
  probability[row] = 1.0f;
}
