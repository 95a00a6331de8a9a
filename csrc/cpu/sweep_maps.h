#pragma once
// One pass over whole maps.

#include "tile.h"

namespace resdense::cpu {

// Runs one pass over whole maps, tile by tile. `s` carries the pass, its coefficients and activation.
inline void sweep_maps(Sweep s, std::initializer_list<const Map*> in, const Map& out, Sums* sums = nullptr) {
  s.dtype = out.dtype, s.channels_last = out.channels_last, s.channels = out.C, s.out = operand(out);
  int i = 0;
  for (const Map* m : in) s.in[i++] = operand(*m);
  const Tiling tiling(out, out.C * element_size(out.dtype) * i);
  tiling.each([&](int64_t chunk, int64_t, int64_t, const std::vector<Segment>& segments) {
    Sweep tile = s;
    tile.segments = segments.data(), tile.segment_count = static_cast<int64_t>(segments.size());
    for (int which = 0; sums && which < sums->count(); ++which) tile.sums[which] = sums->of(chunk, which);
    kernels.sweep(tile);
  });
}

}  // namespace resdense::cpu
