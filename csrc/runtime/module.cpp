// memkernels._runtime: objects with a life time, for the Python that builds it. Its types stand in _runtime.pyi.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <string>

#include "runtime/copy_engine.h"
#include "runtime/crc32c.h"
#include "runtime/errors.h"
#include "runtime/host_calls.h"
#include "runtime/pinned_slab.h"
#include "runtime/spill_file.h"
#include "runtime/uring.h"

namespace py = pybind11;
using namespace memkernels::runtime;

namespace {

using WithoutGil = py::call_guard<py::gil_scoped_release>;

py::dict as_dict(const RegionStatistics& s) {
  using py::literals::operator""_a;
  return py::dict("size"_a = s.size, "in_use"_a = s.in_use, "peak_in_use"_a = s.peak_in_use, "ranges"_a = s.ranges,
                  "largest_free"_a = s.largest_free);
}

uint32_t crc32c(const py::buffer& data, bool hardware) {
  const py::buffer_info info = data.request();
  const size_t bytes = info.size * info.itemsize;
  uint32_t checksum = 0;
  const auto* begin = static_cast<const uint8_t*>(info.ptr);
  (hardware ? crc32c_blocks : crc32c_blocks_portable)(begin, bytes, std::max<size_t>(8, (bytes + 7) / 8 * 8),
                                                      &checksum);
  return checksum;
}

void translate(std::exception_ptr error) {
  try {
    if (error) std::rethrow_exception(error);
  } catch (const FileError& e) {
    PyErr_SetObject(PyExc_OSError, py::make_tuple(e.code, e.what(), e.path).ptr());
  } catch (const OutOfMemory& e) {
    PyErr_SetString(PyExc_MemoryError, e.what());
  }
}

}  // namespace

PYBIND11_MODULE(_runtime, m) {
  py::register_exception_translator(translate);

  py::class_<CudaCalls, std::shared_ptr<CudaCalls>>(m, "CudaCalls")
      .def(py::init<const std::string&>(), py::arg("library"));
  py::class_<HostCalls, CudaCalls, std::shared_ptr<HostCalls>>(m, "HostCalls").def(py::init<>());

  py::class_<Copy, std::shared_ptr<Copy>>(m, "Copy")
      .def("done", &Copy::done)
      .def("wait", &Copy::wait, WithoutGil())
      .def("wait_on", &Copy::wait_on, py::arg("stream"), WithoutGil());

  py::class_<CopyEngine>(m, "CopyEngine")
      .def(py::init<std::shared_ptr<const CudaCalls>, int>(), py::arg("cuda"), py::kw_only(), py::arg("device"))
      .def("out", &CopyEngine::out, py::arg("address"), py::arg("block"), py::kw_only(), py::arg("stream"))
      .def("into", &CopyEngine::into, py::arg("address"), py::arg("block"), py::kw_only(), py::arg("stream"))
      .def_property_readonly("out_stream", &CopyEngine::out_stream)
      .def_property_readonly("in_stream", &CopyEngine::in_stream)
      .def("pending", &CopyEngine::pending);

  py::class_<SlabBlock, std::shared_ptr<SlabBlock>>(m, "SlabBlock", py::buffer_protocol())
      .def_property_readonly("nbytes", &SlabBlock::bytes)
      .def_buffer([](const SlabBlock& block) {
        return py::buffer_info(reinterpret_cast<uint8_t*>(block.data()), block.bytes());
      });

  py::class_<PinnedSlab, std::shared_ptr<PinnedSlab>>(m, "PinnedSlab")
      .def(py::init<int64_t, int64_t, std::shared_ptr<const CudaCalls>>(), py::kw_only(), py::arg("limit"),
           py::arg("step"), py::arg("cuda") = nullptr)
      .def("allocate", &PinnedSlab::allocate, py::arg("nbytes"))
      .def("trim", &PinnedSlab::trim)
      .def_property_readonly("limit", &PinnedSlab::limit)
      .def("statistics", [](const PinnedSlab& slab) { return as_dict(slab.statistics()); });

  py::class_<Transfer, std::shared_ptr<Transfer>>(m, "Transfer")
      .def("done", &Transfer::done)
      .def("wait", &Transfer::wait, WithoutGil());

  py::class_<Extent, std::shared_ptr<Extent>>(m, "Extent")
      .def_readonly("nbytes", &Extent::bytes)
      .def_readonly("offset", &Extent::offset)
      .def_readonly("writing", &Extent::writing);

  py::class_<SpillFile>(m, "SpillFile")
      .def(py::init<const std::string&, int, bool>(), py::arg("folder"), py::kw_only(), py::arg("threads"),
           py::arg("io_uring") = true)
      .def("write", &SpillFile::write, py::arg("block"), py::arg("after") = nullptr, WithoutGil())
      .def("read", &SpillFile::read, py::arg("extent"), py::arg("block"), WithoutGil())
      .def("trim", &SpillFile::trim)
      .def("fileno", [](const SpillFile& file) { return file.storage().descriptor(); })
      .def_property_readonly("io_uring", &SpillFile::io_uring)
      .def_property_readonly("direct", [](const SpillFile& file) { return file.storage().direct(); })
      .def_property_readonly("in_memory", [](const SpillFile& file) { return file.storage().in_memory(); })
      .def_property_readonly("bytes_written", &SpillFile::bytes_written)
      .def_property_readonly("bytes_read", &SpillFile::bytes_read)
      .def("statistics", [](const SpillFile& file) { return as_dict(file.storage().statistics()); });

  m.def("io_uring_missing", &io_uring_missing);
  m.def("crc32c", &crc32c, py::arg("data"), py::kw_only(), py::arg("hardware") = true);
}
