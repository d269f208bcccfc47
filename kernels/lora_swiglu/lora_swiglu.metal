// silu(gate) · up of a gated MLP for one new token a row, of what the row's own adapter makes of gate and up: what `lora`
// twice and then that would do.
// x [rows, IN]  gate, up [rows, GATE_ROW, UP_ROW], what the layers made of it, each from its START on: they may be one array
// index [rows]: 0 is no adapter; where ADAPTED (1: gate, 2: up) as in `lora` a0, b0, gain0, shift0 of gate, 1 of up; GAIN and
// SHIFT in bits, too
//   →  out [rows, OUT]
// A threadgroup makes x A of both, and from them ITEMS outputs a thread.
threadgroup float part[SIMDGROUPS * 32 * PACK];
threadgroup float inner_gate[RANK];
threadgroup float inner_up[RANK];
const uint row = threadgroup_position_in_grid.x;
const uint thread_index = thread_position_in_threadgroup.x;
const uint threads = threads_per_threadgroup.x;
const uint lane = thread_index_in_simdgroup;
const uint adapter = uint(index[row]);
if (adapter > 0) {  // the same in the whole threadgroup
  const size_t a_start = size_t(adapter) * IN * RANK;
  auto from = x + size_t(row) * IN;
  if (ADAPTED & 1)
    times_a<S, IN, RANK, PACK, COLUMNS, STEPS, DEPTH, SIMDGROUPS>(from, a0 + a_start, part, inner_gate, thread_index, lane);
  if (ADAPTED & 2)
    times_a<S, IN, RANK, PACK, COLUMNS, STEPS, DEPTH, SIMDGROUPS>(from, a1 + a_start, part, inner_up, thread_index, lane);
}
const size_t side = size_t(adapter) * OUT;
for (int k = 0; k < ITEMS; k++) {
  const uint o = (threadgroup_position_in_grid.y * uint(ITEMS) + uint(k)) * threads + thread_index;
  if (o < uint(OUT)) {
    // Rounded as `lora` stores them.
    float g = float(gate[size_t(row) * GATE_ROW + GATE_START + o]);
    float u = float(up[size_t(row) * UP_ROW + UP_START + o]);
    if (adapter > 0 && (ADAPTED & 1) != 0)
      g = float(T(adapted<RANK, (GAIN & 1) != 0, (SHIFT & 1) != 0>(g, b0 + side * RANK, gain0 + side, shift0 + side, inner_gate, uint(OUT), o)));
    if (adapter > 0 && (ADAPTED & 2) != 0)
      u = float(T(adapted<RANK, (GAIN & 2) != 0, (SHIFT & 2) != 0>(u, b1 + side * RANK, gain1 + side, shift1 + side, inner_up, uint(OUT), o)));
    out[size_t(row) * OUT + o] = T(g / (1.0f + metal::exp(-g)) * u);
  }
}
