// The Python module `fastrecycle_kernels._host`: allocates results and releases the GIL.
// Arguments come checked from `fastrecycle_kernels.host`; dtypes and layouts are enforced here.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <limits>
#include <stdexcept>
#include <vector>

#include "host.hpp"

namespace py = pybind11;

namespace {

template <class T>
using Array = py::array_t<T, py::array::c_style>;
using Int64 = Array<std::int64_t>;
using Mask = Array<std::uint8_t>;

constexpr int interface_version = 2;  // host.py asks for this one

void expect(bool holds, const char* what) {
  if (!holds) throw std::invalid_argument(std::string("_host: ") + what);
}

// Offsets into an array of `length`, rising from 0 to it.
void expect_offsets(const Int64& offsets, std::int64_t length) {
  const std::int64_t n = offsets.size();
  const std::int64_t* x = offsets.data();
  bool holds = n >= 1 && x[0] == 0 && x[n - 1] == length;
  for (std::int64_t i = 1; holds && i < n; ++i) holds = x[i - 1] <= x[i];
  expect(holds, "offsets must rise from 0 to the length of what they cut");
}

py::tuple finish_plan(const std::uint8_t* mask, const std::vector<std::int64_t>& starts,
                      std::int64_t images, std::int64_t patches, std::int64_t prefix,
                      int threads) {
  const std::int64_t total = starts.back(), kept = total - images * prefix;
  expect(total <= std::numeric_limits<std::int32_t>::max(), "cu_seqlens is 32 bit");
  Array<std::int32_t> cu_seqlens(images + 1);
  Int64 gather(total), scatter(images * (prefix + patches)), merge(total), chosen(kept),
      image(kept);
  std::int64_t longest = 0;
  for (std::size_t i = 0; i < starts.size(); ++i) {
    cu_seqlens.mutable_data()[i] = static_cast<std::int32_t>(starts[i]);
    if (i > 0) longest = std::max(longest, starts[i] - starts[i - 1]);
  }
  const fastrecycle::Packing out{gather.mutable_data(), scatter.mutable_data(),
                                 merge.mutable_data(), chosen.mutable_data(),
                                 image.mutable_data()};
  {
    const py::gil_scoped_release release;
    fastrecycle::plan(mask, starts.data(), images, patches, prefix, out, threads);
  }
  return py::make_tuple(cu_seqlens, gather, scatter, merge, chosen, image, longest);
}

py::tuple plan_masks(const Mask& mask, std::int64_t prefix, int threads) {
  expect(mask.ndim() == 2 && prefix >= 0, "mask must be (B, n), prefix at least 0");
  const std::int64_t images = mask.shape(0), patches = mask.shape(1);
  const std::uint8_t* bytes = mask.data();
  std::vector<std::int64_t> starts(static_cast<std::size_t>(images) + 1);
  {
    const py::gil_scoped_release release;
    fastrecycle::count_kept(bytes, images, patches, prefix, starts.data(), threads);
  }
  return finish_plan(bytes, starts, images, patches, prefix, threads);
}

py::tuple plan_orders(const Int64& order, const Int64& counts, std::int64_t patches,
                      std::int64_t prefix, int threads) {
  expect(order.ndim() == 2 && counts.ndim() == 1 && counts.shape(0) == order.shape(0) &&
             patches >= 0 && prefix >= 0,
         "order must be (B, K), counts (B,), patches and prefix at least 0");
  const std::int64_t images = order.shape(0), width = order.shape(1);
  const std::int64_t *ranked = order.data(), *kept = counts.data();
  std::vector<std::uint8_t> mask(static_cast<std::size_t>(images * patches), 0);
  std::vector<std::int64_t> starts(static_cast<std::size_t>(images) + 1, 0);
  for (std::int64_t i = 0; i < images; ++i) {
    const auto at = static_cast<std::size_t>(i);
    expect(kept[i] >= 0 && kept[i] <= width, "counts must be in [0, K]");
    starts[at + 1] = starts[at] + prefix + kept[i];
  }
  {
    const py::gil_scoped_release release;
    fastrecycle::mark_kept(ranked, kept, images, width, patches, mask.data(), threads);
  }
  return finish_plan(mask.data(), starts, images, patches, prefix, threads);
}

py::tuple draw_episodes(const Int64& names, const Int64& starts, const Int64& members,
                        std::int64_t ways, std::int64_t shots, std::int64_t queries,
                        std::int64_t tasks, std::uint64_t seed, int threads) {
  const std::int64_t count = names.size();
  expect(ways >= 1 && shots >= 0 && queries >= 0 && tasks >= 0 && ways <= count,
         "ways must be in [1, classes], shots, queries and tasks at least 0");
  expect(starts.size() == count + 1, "starts must be (classes + 1,)");
  expect_offsets(starts, members.size());
  for (std::int64_t i = 0; i < count; ++i) {
    expect(starts.data()[i + 1] - starts.data()[i] >= shots + queries,
           "a class has fewer images than shots + queries");
  }
  Int64 classes({tasks, ways}), support({tasks, ways * shots}), query({tasks, ways * queries});
  const std::int64_t *n = names.data(), *s = starts.data(), *m = members.data();
  std::int64_t *c = classes.mutable_data(), *u = support.mutable_data(), *q = query.mutable_data();
  {
    const py::gil_scoped_release release;
    fastrecycle::draw_episodes(n, s, m, count, ways, shots, queries, tasks, seed, c, u, q, threads);
  }
  return py::make_tuple(classes, support, query);
}

py::tuple draw_steps(const Int64& rows, const Int64& groups, const Int64& labels,
                     const Int64& wide, const Int64& classes, const Int64& holders,
                     const Int64& shown, const Int64& shown_starts, std::int64_t ways,
                     std::int64_t need, std::int64_t tasks, double interpolation, bool from_all,
                     std::uint64_t seed, std::uint64_t first, std::int64_t steps, int threads) {
  expect(ways >= 1 && need >= 0 && tasks >= 0 && steps >= 0, "counts must be positive");
  expect_offsets(groups, rows.size());
  const std::int64_t group_count = groups.size() - 1;
  expect(labels.size() == group_count, "labels must be (groups,)");
  for (std::int64_t i = 0; i < group_count; ++i) {
    const std::int64_t size = groups.data()[i + 1] - groups.data()[i];
    expect(size >= need && size <= std::numeric_limits<std::int32_t>::max(),
           "a group has fewer rows than a task takes");
  }
  expect(wide.ndim() == 2 && wide.shape(1) == 2, "wide must be (LoRAs, 2)");
  for (std::int64_t i = 0; i < wide.shape(0); ++i) {
    const std::int64_t start = wide.data()[2 * i], size = wide.data()[2 * i + 1];
    expect(start >= 0 && size >= ways && start <= group_count - size,
           "a LoRA has fewer classes than ways");
  }
  expect_offsets(classes, holders.size());
  const std::int64_t class_count = classes.size() - 1;
  expect_offsets(shown_starts, shown.size());
  expect(shown_starts.size() == classes.size(), "shown_starts must be (classes + 1,)");
  for (std::int64_t i = 0; i < class_count; ++i) {
    expect(classes.data()[i] < classes.data()[i + 1], "a class has no group");
    const std::int64_t size = shown_starts.data()[i + 1] - shown_starts.data()[i];
    expect(size >= need && size <= std::numeric_limits<std::int32_t>::max(),
           "a class has fewer rows than a task takes");
  }
  for (std::int64_t i = 0; i < holders.size(); ++i) {
    expect(holders.data()[i] >= 0 && holders.data()[i] < group_count, "no such group");
  }
  expect(interpolation <= 0 || class_count >= ways, "fewer classes than ways");
  expect(interpolation >= 1 || wide.shape(0) >= 1, "no LoRA with as many classes as ways");
  Int64 drawn({steps, tasks, ways, need}), columns({steps, tasks, ways});
  const fastrecycle::Tables tables{rows.data(),    groups.data(),  labels.data(),
                                   wide.data(),    wide.shape(0),  classes.data(),
                                   class_count,    holders.data(), shown.data(),
                                   shown_starts.data()};
  std::int64_t *d = drawn.mutable_data(), *c = columns.mutable_data();
  {
    const py::gil_scoped_release release;
    fastrecycle::draw_steps(tables, ways, need, tasks, interpolation, from_all, seed, first, steps,
                            d, c, threads);
  }
  return py::make_tuple(drawn, columns);
}

Int64 top_k(const Array<float>& scores, std::int64_t count, int threads) {
  expect(scores.ndim() == 2 && count >= 0 && count <= scores.shape(1),
         "scores must be (B, n), k in [0, n]");
  const std::int64_t images = scores.shape(0), patches = scores.shape(1);
  Int64 kept({images, count});
  const float* x = scores.data();
  std::int64_t* y = kept.mutable_data();
  {
    const py::gil_scoped_release release;
    fastrecycle::top_k(x, images, patches, count, y, threads);
  }
  return kept;
}

}  // namespace

PYBIND11_MODULE(_host, module, py::mod_gil_not_used()) {
  module.doc() = "C++ of fastrecycle_kernels.host, which documents and checks its functions.";
  module.attr("INTERFACE") = interface_version;
  using py::arg;
  module.def("plan_masks", &plan_masks, arg("mask").noconvert(), arg("prefix"), arg("threads"));
  module.def("plan_orders", &plan_orders, arg("order").noconvert(), arg("counts").noconvert(),
             arg("patches"), arg("prefix"), arg("threads"));
  module.def("draw_episodes", &draw_episodes, arg("names").noconvert(), arg("starts").noconvert(),
             arg("members").noconvert(), arg("ways"), arg("shots"), arg("queries"), arg("tasks"),
             arg("seed"), arg("threads"));
  module.def("draw_steps", &draw_steps, arg("rows").noconvert(), arg("groups").noconvert(),
             arg("labels").noconvert(), arg("wide").noconvert(), arg("classes").noconvert(),
             arg("holders").noconvert(), arg("shown").noconvert(),
             arg("shown_starts").noconvert(), arg("ways"), arg("need"), arg("tasks"),
             arg("interpolation"), arg("from_all"), arg("seed"), arg("first"), arg("steps"),
             arg("threads"));
  module.def("top_k", &top_k, arg("scores").noconvert(), arg("k"), arg("threads"));
}
