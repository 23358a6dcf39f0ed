// Which blocks of a launch run together (params.h: Schedule), on the host.
#pragma once
#include "attention/params.h"

namespace effcore::cuda::attention {

inline int ceil_div(int a, int b) {
  return (a + b - 1) / b;
}

// Heads whose `bytes_per_head` of keys and values together leave room in L2 (50 MB on an H100, 40 on an A100) for what streams
// past.
inline Schedule schedule_of(int heads, int blocks, double bytes_per_head, int heads_per_kv) {
  constexpr double room = 16 << 20;
  const double fitting = room / (bytes_per_head > 1 ? bytes_per_head : 1);
  int section = fitting >= heads ? heads : static_cast<int>(fitting);
  section = section / heads_per_kv * heads_per_kv;
  return {blocks, heads, section < heads_per_kv ? heads_per_kv : section};
}
inline unsigned blocks_of(const Schedule& s) {
  return static_cast<unsigned>(s.blocks) * static_cast<unsigned>(s.heads);
}
// Blocks of rows, each of which walks over its head's values, and keys where it `reads_k`.
template <class T>
Schedule row_schedule(const Shape& s, int rows, bool reads_k) {
  const double bytes = static_cast<double>(s.keys) * ((reads_k ? s.head_dim : 0) + s.value_dim) * sizeof(T) / s.group;
  return schedule_of(s.batch * s.heads, ceil_div(s.queries, rows), bytes, s.group);
}

}  // namespace effcore::cuda::attention
