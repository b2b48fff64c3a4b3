// Columns as Python has them -> ids.
//
// What it does not read it leaves to Python, which reads everything, slowly, and names what is wrong.
#include "arrow.h"
#include "module.h"
#include "values.h"

// Part of every CPython from 3.0 on, with this layout, and of the limited API from 3.11 on.
extern "C" {
struct lt4rec_buffer {
  void* data;
  PyObject* object;
  Py_ssize_t size, item_size;
  int is_read_only, dimensions;
  char* format;
  Py_ssize_t *shape, *strides, *suboffsets;
  void* internal;
};
int PyObject_GetBuffer(PyObject* exporter, lt4rec_buffer* view, int flags);
void PyBuffer_Release(lt4rec_buffer* view);
}

namespace lt4rec {

// Like those of values.h, and where Sink looks for it.
static bool id_of(const Table& table, PyObject* value, int64_t* id) {
  if (value == Py_None) return *id = kMissing, true;
  const PyTypeObject* type = Py_TYPE(value);
  if (type == &PyFloat_Type) {
    const double number = PyFloat_AsDouble(value);
    return table.takes_strings() ? std::isnan(number) && (*id = kMissing, true) : id_of(table, number, id);
  }
  if (type == &PyUnicode_Type) {
    Py_ssize_t size;
    const char* text = table.takes_strings() ? PyUnicode_AsUTF8AndSize(value, &size) : nullptr;
    if (text) return id_of(table, text, size_t(size), id);
    PyErr_Clear();  // a surrogate alone
    return false;
  }
  if (type != &PyLong_Type) return false;
  if (table.takes_numbers()) {
    const double number = PyLong_AsDouble(value);
    if (number == -1 && PyErr_Occurred()) return PyErr_Clear(), false;
    return id_of(table, number, id);
  }
  int overflow;
  const long long whole = PyLong_AsLongLongAndOverflow(value, &overflow);
  return overflow == 0 && id_of(table, int64_t(whole), id);
}

}  // namespace lt4rec

namespace {

using lt4rec::FieldIds;
using lt4rec::Ranker;
using lt4rec::Sink;
using lt4rec::Table;
using module::Owned;

constexpr int kStridedWithFormat = 0x0018 | 0x0004;  // PyBUF_STRIDED | PyBUF_FORMAT

PyTypeObject *array_type = nullptr, *masked_type = nullptr;  // numpy.ndarray, numpy.ma.MaskedArray

// --- Lists --------------------------------------------------------------------------------------------------------

// Items of a list or a tuple, borrowed one by one: both may shrink while they are read, since values are objects.
Py_ssize_t length_of(PyObject* sequence) {
  return PyList_Check(sequence) ? PyList_Size(sequence) : PyTuple_Size(sequence);
}
PyObject* item_of(PyObject* sequence, Py_ssize_t i) {
  PyObject* item = PyList_Check(sequence) ? PyList_GetItem(sequence, i) : PyTuple_GetItem(sequence, i);
  if (!item) PyErr_Clear();
  return item;
}
bool is_sequence(PyObject* object) { return Py_TYPE(object) == &PyList_Type || Py_TYPE(object) == &PyTuple_Type; }

bool put_items(PyObject* sequence, Sink& sink) {
  const Py_ssize_t count = length_of(sequence);
  for (Py_ssize_t i = 0; i < count; ++i) {
    PyObject* item = item_of(sequence, i);
    if (!item || !sink.put(item)) return false;
  }
  return true;
}

// --- Arrays -------------------------------------------------------------------------------------------------------

class Buffer {
 public:
  explicit Buffer(PyObject* array) {
    is_held_ = Py_TYPE(array) == array_type && PyObject_GetBuffer(array, &view_, kStridedWithFormat) == 0;
    if (!is_held_) PyErr_Clear();
  }
  ~Buffer() {
    if (is_held_) PyBuffer_Release(&view_);
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  bool is_column() const { return is_held_ && view_.dimensions == 1; }
  int64_t length() const { return view_.shape[0]; }
  const char* format() const {
    const char* format = view_.format ? view_.format : "B";
    return *format == '<' || *format == '@' || *format == '=' ? format + 1 : format;
  }
  const char* item(int64_t i) const { return static_cast<const char*>(view_.data) + i * view_.strides[0]; }
  int64_t item_size() const { return view_.item_size; }

 private:
  lt4rec_buffer view_;
  bool is_held_;
};

template <class T>
T loaded(const char* from) {
  T value;
  std::memcpy(&value, from, sizeof(value));
  return value;
}

template <class T, class As>
bool put_numbers(const Buffer& buffer, int64_t first, int64_t last, Sink& sink) {
  for (int64_t i = first; i < last; ++i)
    if (!sink.put(As(loaded<T>(buffer.item(i))))) return false;
  return true;
}

// numpy's text: as many code points as the longest has, zeros after the others.
bool put_texts(const Buffer& buffer, int64_t first, int64_t last, Sink& sink) {
  const int64_t points = buffer.item_size() / 4;
  std::vector<char> text(size_t(4 * points));
  for (int64_t i = first; i < last; ++i) {
    int64_t count = points;
    while (count > 0 && loaded<uint32_t>(buffer.item(i) + 4 * (count - 1)) == 0) --count;
    char* to = text.data();
    for (int64_t p = 0; p < count; ++p) {
      const auto c = loaded<uint32_t>(buffer.item(i) + 4 * p);
      const auto tail = [&](int shift) { *to++ = char(0x80 | (c >> shift & 0x3f)); };
      if (c < 0x80) {
        *to++ = char(c);
      } else if (c < 0x800) {
        *to++ = char(0xc0 | c >> 6), tail(0);
      } else if (c < 0x10000) {
        *to++ = char(0xe0 | c >> 12), tail(6), tail(0);
      } else {
        *to++ = char(0xf0 | c >> 18), tail(12), tail(6), tail(0);
      }
    }
    if (!sink.put(static_cast<const char*>(text.data()), size_t(to - text.data()))) return false;
  }
  return true;
}

bool put_objects(const Buffer& buffer, int64_t first, int64_t last, Sink& sink) {
  for (int64_t i = first; i < last; ++i) {
    PyObject* object = loaded<PyObject*>(buffer.item(i));
    if (!object || !sink.put(object)) return false;
  }
  return true;
}

bool put_items(const Buffer& buffer, int64_t first, int64_t last, Sink& sink) {
  const char* format = buffer.format();
  if (format[0] >= '0' && format[0] <= '9') {
    const char* type = format;
    while (*type >= '0' && *type <= '9') ++type;
    return type[0] == 'w' && type[1] == 0 && put_texts(buffer, first, last, sink);
  }
  if (format[0] == 0 || format[1] != 0) return false;
  switch (format[0]) {
    case 'b': return put_numbers<int8_t, int64_t>(buffer, first, last, sink);
    case 'h': return put_numbers<int16_t, int64_t>(buffer, first, last, sink);
    case 'i': return put_numbers<int32_t, int64_t>(buffer, first, last, sink);
    case 'l':
    case 'q':
      return buffer.item_size() == 8 ? put_numbers<int64_t, int64_t>(buffer, first, last, sink)
                                     : put_numbers<int32_t, int64_t>(buffer, first, last, sink);
    case 'B': return put_numbers<uint8_t, int64_t>(buffer, first, last, sink);
    case 'H': return put_numbers<uint16_t, int64_t>(buffer, first, last, sink);
    case 'I': return put_numbers<uint32_t, int64_t>(buffer, first, last, sink);
    case 'L':
    case 'Q':
      return buffer.item_size() == 8 ? put_numbers<uint64_t, uint64_t>(buffer, first, last, sink)
                                     : put_numbers<uint32_t, int64_t>(buffer, first, last, sink);
    case 'f': return put_numbers<float, double>(buffer, first, last, sink);
    case 'd': return put_numbers<double, double>(buffer, first, last, sink);
    case 'w': return put_texts(buffer, first, last, sink);
    case 'O': return put_objects(buffer, first, last, sink);
    default: return false;
  }
}

// An array and its mask, in which True is a missing value; numpy has one value in place of a mask that is all False.
bool put_masked(PyObject* array, Sink& sink) {
  const Owned data(PyObject_GetAttrString(array, "data")), mask(PyObject_GetAttrString(array, "mask"));
  if (!data || !mask) return PyErr_Clear(), false;
  const Buffer values(data.get()), masks(mask.get());
  if (!values.is_column()) return false;
  if (!masks.is_column()) return Py_TYPE(mask.get()) != array_type && put_items(values, 0, values.length(), sink);
  if (masks.item_size() != 1 || masks.length() != values.length()) return false;
  for (int64_t i = 0; i < values.length(); ++i) {
    if (*masks.item(i))
      sink.put_missing();
    else if (!put_items(values, i, i + 1, sink))
      return false;
  }
  return true;
}

// --- Arrow --------------------------------------------------------------------------------------------------------

bool is_format(const arrow::Schema& schema, const char* format) { return std::strcmp(schema.format, format) == 0; }

bool is_valid(const arrow::Array& array, int64_t i) {
  const auto* bits = array.buffer_count > 0 ? static_cast<const uint8_t*>(array.buffers[0]) : nullptr;
  return !bits || (bits[i / 8] >> (i % 8) & 1);
}

template <class T, class As>
bool put_arrow_numbers(const arrow::Array& array, int64_t first, int64_t last, Sink& sink) {
  const auto* values = static_cast<const T*>(array.buffers[1]);
  for (int64_t i = first; i < last; ++i) {
    if (!is_valid(array, i))
      sink.put_missing();
    else if (!sink.put(As(values[i])))
      return false;
  }
  return true;
}

template <class Offset>
bool put_arrow_texts(const arrow::Array& array, int64_t first, int64_t last, Sink& sink) {
  const auto* offsets = static_cast<const Offset*>(array.buffers[1]);
  const auto* bytes = static_cast<const char*>(array.buffers[2]);
  for (int64_t i = first; i < last; ++i) {
    if (!is_valid(array, i))
      sink.put_missing();
    else if (!sink.put(bytes + offsets[i], size_t(offsets[i + 1] - offsets[i])))
      return false;
  }
  return true;
}

// Texts of up to 12 bytes stand in their views, longer ones in one of the buffers after them.
bool put_arrow_views(const arrow::Array& array, int64_t first, int64_t last, Sink& sink) {
  const auto* views = static_cast<const char*>(array.buffers[1]);
  for (int64_t i = first; i < last; ++i) {
    if (!is_valid(array, i)) {
      sink.put_missing();
      continue;
    }
    const char* view = views + 16 * i;
    const auto size = loaded<int32_t>(view);
    const char* text = view + 4;
    if (size > 12)
      text = static_cast<const char*>(array.buffers[2 + loaded<int32_t>(view + 8)]) + loaded<int32_t>(view + 12);
    if (!sink.put(text, size_t(size))) return false;
  }
  return true;
}

// Values [first, last) of an array, counted from its buffers' beginning: with its offset.
bool put_arrow(const arrow::Schema& schema, const arrow::Array& array, int64_t first, int64_t last, Sink& sink);

template <class Index>
bool put_arrow_words(const arrow::Schema& schema, const arrow::Array& array, int64_t first, int64_t last, Sink& sink) {
  const auto* indices = static_cast<const Index*>(array.buffers[1]);
  const int64_t begin = array.dictionary->offset;
  for (int64_t i = first; i < last; ++i) {
    const int64_t word = begin + int64_t(indices[i]);
    if (!is_valid(array, i))
      sink.put_missing();
    else if (word < begin || word >= begin + array.dictionary->length || !put_arrow(*schema.dictionary, *array.dictionary, word, word + 1, sink))
      return false;
  }
  return true;
}

bool put_arrow(const arrow::Schema& schema, const arrow::Array& array, int64_t first, int64_t last, Sink& sink) {
  const char type = schema.format[0];
  if (schema.format[1] == 0 && schema.dictionary) {
    switch (type) {
      case 'c': return put_arrow_words<int8_t>(schema, array, first, last, sink);
      case 'C': return put_arrow_words<uint8_t>(schema, array, first, last, sink);
      case 's': return put_arrow_words<int16_t>(schema, array, first, last, sink);
      case 'S': return put_arrow_words<uint16_t>(schema, array, first, last, sink);
      case 'i': return put_arrow_words<int32_t>(schema, array, first, last, sink);
      case 'I': return put_arrow_words<uint32_t>(schema, array, first, last, sink);
      case 'l': return put_arrow_words<int64_t>(schema, array, first, last, sink);
      default: return false;
    }
  }
  if (is_format(schema, "vu")) return put_arrow_views(array, first, last, sink);
  if (schema.format[1] != 0) return false;
  switch (type) {
    case 'c': return put_arrow_numbers<int8_t, int64_t>(array, first, last, sink);
    case 'C': return put_arrow_numbers<uint8_t, int64_t>(array, first, last, sink);
    case 's': return put_arrow_numbers<int16_t, int64_t>(array, first, last, sink);
    case 'S': return put_arrow_numbers<uint16_t, int64_t>(array, first, last, sink);
    case 'i': return put_arrow_numbers<int32_t, int64_t>(array, first, last, sink);
    case 'I': return put_arrow_numbers<uint32_t, int64_t>(array, first, last, sink);
    case 'l': return put_arrow_numbers<int64_t, int64_t>(array, first, last, sink);
    case 'L': return put_arrow_numbers<uint64_t, uint64_t>(array, first, last, sink);
    case 'f': return put_arrow_numbers<float, double>(array, first, last, sink);
    case 'g': return put_arrow_numbers<double, double>(array, first, last, sink);
    case 'u': return put_arrow_texts<int32_t>(array, first, last, sink);
    case 'U': return put_arrow_texts<int64_t>(array, first, last, sink);
    case 'n':
      for (int64_t i = first; i < last; ++i) sink.put_missing();
      return true;
    default: return false;
  }
}

template <class Offset>
bool put_arrow_bags(const arrow::Schema& schema, const arrow::Array& array, Sink& sink) {
  const auto* offsets = static_cast<const Offset*>(array.buffers[1]);
  const arrow::Array& values = *array.children[0];
  for (int64_t i = array.offset; i < array.offset + array.length; ++i) {
    const int64_t first = values.offset + offsets[i], last = values.offset + offsets[i + 1];
    if (is_valid(array, i) && !put_arrow(*schema.children[0], values, first, last, sink)) return false;
    sink.end();
  }
  return true;
}

bool put_arrow_column(const arrow::Schema& schema, const arrow::Array& array, bool is_bag, Sink& sink) {
  if (!is_bag) return put_arrow(schema, array, array.offset, array.offset + array.length, sink);
  if (is_format(schema, "+l")) return put_arrow_bags<int32_t>(schema, array, sink);
  return is_format(schema, "+L") && put_arrow_bags<int64_t>(schema, array, sink);
}

// An object with an Arrow capsule: an array, or a stream of them.
bool read_arrow(PyObject* object, bool is_bag, Sink& sink) {
  if (Owned method{PyObject_GetAttrString(object, "__arrow_c_array__")}) {
    const Owned pair(PyObject_CallObject(method.get(), nullptr));
    if (!pair || !PyTuple_Check(pair.get()) || PyTuple_Size(pair.get()) != 2) return false;
    const auto* schema = static_cast<arrow::Schema*>(
        PyCapsule_GetPointer(PyTuple_GetItem(pair.get(), 0), "arrow_schema"));
    const auto* array = schema ? static_cast<arrow::Array*>(
                                     PyCapsule_GetPointer(PyTuple_GetItem(pair.get(), 1), "arrow_array"))
                               : nullptr;
    return array && put_arrow_column(*schema, *array, is_bag, sink);
  }
  PyErr_Clear();
  const Owned method(PyObject_GetAttrString(object, "__arrow_c_stream__"));
  if (!method) return false;
  const Owned capsule(PyObject_CallObject(method.get(), nullptr));
  auto* stream = capsule ? static_cast<arrow::Stream*>(PyCapsule_GetPointer(capsule.get(), "arrow_array_stream"))
                         : nullptr;
  arrow::Schema schema{};
  if (!stream || stream->schema(stream, &schema) != 0) return false;
  bool is_read = true;
  while (is_read) {
    arrow::Array array{};
    is_read = stream->next(stream, &array) == 0;
    if (!is_read || !array.release) break;
    is_read = put_arrow_column(schema, array, is_bag, sink);
    array.release(&array);
  }
  if (schema.release) schema.release(&schema);
  return is_read;
}

// --- Columns ------------------------------------------------------------------------------------------------------

bool read_bags(PyObject* column, const char* separator, bool is_text, Sink& sink) {
  const Py_ssize_t count = length_of(column);
  for (Py_ssize_t i = 0; i < count; ++i) {
    PyObject* row = item_of(column, i);
    if (!row) return false;
    const PyTypeObject* type = Py_TYPE(row);
    if (row == Py_None || (type == &PyFloat_Type && std::isnan(PyFloat_AsDouble(row)))) {
      // an empty bag
    } else if (type == &PyUnicode_Type) {
      Py_ssize_t size;
      const char* text = PyUnicode_AsUTF8AndSize(row, &size);
      if (!text) return PyErr_Clear(), false;
      if (!put_text(text, size_t(size), separator, is_text, sink)) return false;
    } else if (is_sequence(row)) {
      if (!put_items(row, sink)) return false;
    } else {
      const Buffer values(row);
      if (!values.is_column() || !put_items(values, 0, values.length(), sink)) return false;
    }
    sink.end();
  }
  return true;
}

// (values, offsets): row b is values[offsets[b] : offsets[b + 1]].
bool read_pair(PyObject* pair, FieldIds& field, Sink& sink) {
  const Buffer values(PyTuple_GetItem(pair, 0)), offsets(PyTuple_GetItem(pair, 1));
  if (!values.is_column() || !offsets.is_column() || offsets.length() < 1) return false;
  const char* format = offsets.format();
  const bool is_long = std::strchr("lq", format[0]) && offsets.item_size() == 8;
  if (format[0] == 0 || format[1] != 0 || !(is_long || format[0] == 'i')) return false;
  const auto offset = [&](int64_t i) {
    return is_long ? loaded<int64_t>(offsets.item(i)) : loaded<int32_t>(offsets.item(i));
  };
  const int64_t rows = offsets.length() - 1;
  if (offset(0) != 0 || offset(rows) != values.length()) return false;
  for (int64_t row = 0; row < rows; ++row) {
    // The array might be written to meanwhile.
    const int64_t first = row == 0 ? 0 : std::min(offset(row), values.length()), last = offset(row + 1);
    if (last < first || last > values.length() || !put_items(values, first, last, sink)) return false;
    sink.end();
  }
  return int64_t(field.ends.size()) == rows;
}

}  // namespace

bool module::read_column(const Ranker& ranker, int64_t i, PyObject* column, FieldIds& field) {
  const FieldSpec& spec = ranker.field(i);
  const Table& table = ranker.table_of(i);
  Sink sink(table, field, spec.is_bag);
  bool is_read;
  if (spec.is_bag && Py_TYPE(column) == &PyTuple_Type && PyTuple_Size(column) == 2 &&
      Py_TYPE(PyTuple_GetItem(column, 0)) == array_type) {
    is_read = read_pair(column, field, sink);
  } else if (is_sequence(column)) {
    is_read = spec.is_bag ? read_bags(column, reinterpret_cast<const char*>(spec.separator), table.takes_strings(), sink)
                          : put_items(column, sink);
  } else if (Py_TYPE(column) == array_type) {
    const Buffer values(column);
    is_read = !spec.is_bag && values.is_column() && put_items(values, 0, values.length(), sink);
  } else if (Py_TYPE(column) == masked_type) {
    is_read = !spec.is_bag && put_masked(column, sink);
  } else {
    is_read = read_arrow(column, spec.is_bag, sink);
    PyErr_Clear();
  }
  field.rows = int64_t(spec.is_bag ? field.ends.size() : field.ids.size());
  return is_read;
}

// use_arrays(numpy.ndarray, numpy.ma.MaskedArray)
PyObject* module::use_arrays(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (count != 2) return PyErr_Format(PyExc_TypeError, "arguments: got %zd, wanted 2", count);
  Py_INCREF(args[0]);
  Py_INCREF(args[1]);
  array_type = reinterpret_cast<PyTypeObject*>(args[0]);
  masked_type = reinterpret_cast<PyTypeObject*>(args[1]);
  Py_RETURN_NONE;
}
