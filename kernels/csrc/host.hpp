// The functions of the extension, on plain pointers: all arrays are C-contiguous.
#pragma once

#include <cstdint>

namespace fastrecycle {

// ------------------------------------------------------------------ packed batches (packing.cpp)

struct Packing {  // where a plan is written; see fastrecycle_kernels.host.Packing
  std::int64_t* gather;
  std::int64_t* scatter;
  std::int64_t* merge;
  std::int64_t* patches;
  std::int64_t* image;
};

// starts[i + 1] - starts[i] = prefix + patches kept of image i.
// mask (images, patches) -> starts (images + 1,).
void count_kept(const std::uint8_t* mask, std::int64_t images, std::int64_t patches,
                std::int64_t prefix, std::int64_t* starts, int threads);

// order (images, width), counts (images,) -> mask (images, patches), zero before.
// Throws std::invalid_argument where a patch is out of range or named twice.
void mark_kept(const std::int64_t* order, const std::int64_t* counts, std::int64_t images,
               std::int64_t width, std::int64_t patches, std::uint8_t* mask, int threads);

void plan(const std::uint8_t* mask, const std::int64_t* starts, std::int64_t images,
          std::int64_t patches, std::int64_t prefix, const Packing& out, int threads);

// ------------------------------------------------------------------ tasks (episodes.cpp)

// names (C,), starts (C + 1,), members (starts[C],) -> classes (tasks, ways),
// support (tasks, ways, shots), query (tasks, ways, queries).
void draw_episodes(const std::int64_t* names, const std::int64_t* starts,
                   const std::int64_t* members, std::int64_t classes_in_all, std::int64_t ways,
                   std::int64_t shots, std::int64_t queries, std::int64_t tasks,
                   std::uint64_t seed, std::int64_t* classes, std::int64_t* support,
                   std::int64_t* query, int threads);

struct Tables {  // see fastrecycle_kernels.host.TaskTables
  const std::int64_t* rows;
  const std::int64_t* groups;
  const std::int64_t* labels;
  const std::int64_t* wide;
  std::int64_t wide_count;
  const std::int64_t* classes;
  std::int64_t class_count;
  const std::int64_t* holders;
  const std::int64_t* shown;
  const std::int64_t* shown_starts;
};

// steps [first, first + steps) -> rows (steps, tasks, ways, need), labels (steps, tasks, ways).
// from_all: images of an interpolated class come from all LoRAs that show it, not from one.
void draw_steps(const Tables& tables, std::int64_t ways, std::int64_t need, std::int64_t tasks,
                double interpolation, bool from_all, std::uint64_t seed, std::uint64_t first,
                std::int64_t steps, std::int64_t* rows, std::int64_t* labels, int threads);

// ------------------------------------------------------------------ selection (select.cpp)

// scores (images, patches) -> kept (images, count), ascending within each row.
void top_k(const float* scores, std::int64_t images, std::int64_t patches, std::int64_t count,
           std::int64_t* kept, int threads);

}  // namespace fastrecycle
