// Reads an engine file, trusting nothing. Checks stand in the order in which each makes the next one safe.
#include "engine_file.h"

#include <array>
#include <cfloat>
#include <cmath>
#include <cstring>

#include "sha256.h"
#include "tables.h"
#include "utf8.h"

#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "engine files are little-endian, and read as they are"
#endif

namespace lt4rec {
namespace {

// Bounds of what the engine counts in 32 bits: slots and dot products of fields.
constexpr uint64_t kMaxFields = 4096, kMaxTasks = 4096, kMaxDim = 1 << 16, kMaxTableSize = uint64_t{1} << 40;

std::string text(uint64_t value) { return std::to_string(value); }
std::string text(int64_t value) { return std::to_string(value); }
std::string text(double value) {
  char digits[32];
  std::snprintf(digits, sizeof(digits), "%g", value);
  return digits;
}

// The part of the file that is at hand, for messages: made text only where it is refused.
struct Place {
  const char* section;
  int64_t index = -1;
  const char* part = nullptr;

  Place of(const char* name) const { return {section, index, name}; }
  std::string shown() const {
    std::string name = section;
    if (index >= 0) name += "[" + text(index) + "]";
    if (part) name += std::string(".") + part;
    return name;
  }
};

[[noreturn]] void refuse(const Place& place, const std::string& got, const std::string& wanted) {
  throw Refused(place.shown() + ": got " + got + ", wanted " + wanted);
}

void want(bool is_right, const Place& place, uint64_t got, const char* wanted) {
  if (!is_right) refuse(place, text(got), wanted);
}

void want_equal(const Place& place, uint64_t got, uint64_t wanted) {
  if (got != wanted) refuse(place, text(got), text(wanted));
}

int64_t address_of(const void* of) { return reinterpret_cast<int64_t>(of); }

class File {
 public:
  File(const uint8_t* bytes, uint64_t size) : bytes_(bytes), size_(size) {}

  // Null where there are no elements.
  template <class T>
  const T* array(const Array& of, const Place& place) const {
    static_assert(alignof(T) <= 8, "arrays begin at multiples of 8");
    if (of.count == 0) return nullptr;
    want(of.offset % 8 == 0, place, of.offset, "an offset that is a multiple of 8");
    if (of.count > size_ / sizeof(T) || of.offset > size_ - of.count * sizeof(T))
      refuse(place, text(of.count) + " elements at offset " + text(of.offset), "them within " + text(size_) + " bytes");
    return reinterpret_cast<const T*>(bytes_ + of.offset);
  }

  const char* name(const Array& of, const Place& place, bool may_be_empty) const {
    const char* name = array<char>(of, place);
    const uint64_t length = name ? of.count - 1 : 0;
    if (!name || name[length] != 0 || std::memchr(name, 0, size_t(length)) || !is_utf8(name, size_t(length), false))
      refuse(place, "other bytes", "UTF-8 with one byte 0, at its end");
    if (length == 0 && !may_be_empty) refuse(place, "nothing", "at least one character");
    return name;
  }

  const float* floats(const Array& of, const Place& place) const {
    const auto* values = array<float>(of, place);
    for (uint64_t i = 0; i < of.count; ++i)
      if (!std::isfinite(values[i])) refuse(place, text(double(values[i])) + " at " + text(i), "finite numbers");
    return values;
  }

 private:
  const uint8_t* bytes_;
  uint64_t size_;
};

FileHeader checked_header(const uint8_t* bytes, uint64_t size) {
  FileHeader header;
  if (size < sizeof(header)) refuse({"file"}, text(size) + " bytes", "an engine file of lt4rec_sparse");
  std::memcpy(&header, bytes, sizeof(header));
  if (std::memcmp(header.magic, kMagic, sizeof(kMagic)) != 0)
    refuse({"magic"}, "other bytes", "LT4RECEF: an engine file of lt4rec_sparse");
  if (header.version != kFileVersion)
    refuse({"version"}, text(uint64_t{header.version}), text(uint64_t{kFileVersion}) + ": export the file again");
  want_equal({"bytes"}, header.bytes, size);
  FileHeader zeroed = header;
  std::memset(zeroed.sha256, 0, sizeof(zeroed.sha256));
  Sha256 sha256;
  sha256.add(reinterpret_cast<const uint8_t*>(&zeroed), sizeof(zeroed));
  sha256.add(bytes + sizeof(header), size_t(size) - sizeof(header));
  if (std::memcmp(sha256.digest().data(), header.sha256, sizeof(header.sha256)) != 0)
    refuse({"sha256"}, "another one", "that of the file's bytes: it is damaged");
  want(header.precision <= PRECISION_S8, {"precision"}, header.precision, "0, 1 or 2");
  want(header.rows_kind <= ROWS_S8, {"rows_kind"}, header.rows_kind, "0, 1 or 2");
  want(header.dim >= 1 && header.dim <= kMaxDim, {"dim"}, header.dim, "1 to 65536");
  return header;
}

// --- Embeddings and tables ----------------------------------------------------------------------------------------

uint64_t read_embedding(const File& file, const FileHeader& header, RankerSpec& to) {
  const Place place{"embedding"};
  want(header.embedding.count % header.dim == 0, place, header.embedding.count, "whole rows of dim elements");
  const uint64_t rows = header.embedding.count / header.dim;
  to.dim = header.dim;
  to.rows_kind = header.rows_kind;
  if (header.rows_kind == ROWS_F32) to.embedding = address_of(file.floats(header.embedding, place));
  if (header.rows_kind == ROWS_S8) {
    const auto* bytes = file.array<int8_t>(header.embedding, place);
    for (uint64_t i = 0; i < header.embedding.count; ++i)
      if (bytes[i] == -128) refuse(place, "-128 at " + text(i), "-127 to 127");
    to.embedding = address_of(bytes);
  }
  if (header.rows_kind == ROWS_F16) {
    const auto* halves = file.array<uint16_t>(header.embedding, place);
    for (uint64_t i = 0; i < header.embedding.count; ++i)
      if ((halves[i] & 0x7c00) == 0x7c00) refuse(place, "NaN or Inf at " + text(i), "finite numbers");
    to.embedding = address_of(halves);
  }
  want_equal({"scales"}, header.scales.count, header.rows_kind == ROWS_S8 ? rows : 0);
  const float* scales = file.floats(header.scales, {"scales"});
  for (uint64_t i = 0; i < header.scales.count; ++i)
    if (scales[i] < 0 || scales[i] > FLT_MAX / 127)
      refuse({"scales"}, text(double(scales[i])) + " at " + text(i), "0 to a 127th of the largest float");
  to.scales = address_of(scales);
  return rows;
}

void check_texts(const char* bytes, uint64_t size, const int64_t* offsets, uint64_t count, const Place& place) {
  const Place of_offsets = place.of("offsets");
  if (offsets[0] != 0) refuse(of_offsets, text(offsets[0]) + " first", "0");
  for (uint64_t i = 0; i < count; ++i)
    if (offsets[i + 1] < offsets[i]) refuse(of_offsets, text(offsets[i + 1]) + " at " + text(i + 1), "ascending ones");
  if (uint64_t(offsets[count]) != size) refuse(of_offsets, text(offsets[count]) + " last", text(size));
  for (uint64_t i = 0; i < count; ++i)
    if (offsets[i + 1] > offsets[i] &&  // without any key `bytes` is null
        !is_utf8(bytes + offsets[i], size_t(offsets[i + 1] - offsets[i]), true))
      refuse(place.of("keys"), "other bytes in key " + text(i), "UTF-8");
}

TableSpec read_table(const File& file, const FileTable& from, uint64_t rows, const Place& place) {
  want(from.kind <= TABLE_CUTS, place.of("kind"), from.kind, "0 to 4");
  want_equal(place.of("zero"), from.zero, 0);
  want(from.size >= 2 && from.size <= kMaxTableSize, place.of("size"), from.size, "2 to 2^40");
  if (from.first_row < -1 || (from.first_row >= 0 && (uint64_t(from.first_row) > rows || from.size > rows - uint64_t(from.first_row))))
    refuse(place.of("first_row"), text(from.first_row) + " and " + text(from.size) + " rows",
           "-1, or them within the embedding's " + text(rows));
  TableSpec to{int64_t(from.kind), int64_t(from.size), 0, 0, 0, from.first_row};
  if (from.kind != TABLE_STRINGS) want_equal(place.of("offsets"), from.offsets.count, 0);
  switch (from.kind) {
    case TABLE_INTS: to.keys = address_of(file.array<int64_t>(from.keys, place.of("keys"))); break;
    case TABLE_CUTS: {
      const auto* cuts = file.array<double>(from.keys, place.of("keys"));
      for (uint64_t i = 0; i < from.keys.count; ++i)  // written so that a NaN is refused
        if (!(cuts[i] == cuts[i]) || (i > 0 && !(cuts[i - 1] < cuts[i])))
          refuse(place.of("keys"), text(cuts[i]) + " at " + text(i), "ascending cuts without NaN");
      to.keys = address_of(cuts);
      break;
    }
    case TABLE_STRINGS: {
      const auto* bytes = file.array<char>(from.keys, place.of("keys"));
      const auto* offsets = file.array<int64_t>(from.offsets, place.of("offsets"));
      if (!offsets) refuse(place.of("offsets"), "none", "at least one");
      to.count = int64_t(from.offsets.count) - 1;
      check_texts(bytes, from.keys.count, offsets, uint64_t(to.count), place);
      to.keys = address_of(bytes);
      to.offsets = address_of(offsets);
      break;
    }
    default: want_equal(place.of("keys"), from.keys.count, 0); return to;
  }
  if (from.kind != TABLE_STRINGS) to.count = int64_t(from.keys.count);
  want_equal(place.of("size"), from.size, uint64_t(to.count) + uint64_t{kFirstKnown});
  return to;
}

// --- Fields and columns -------------------------------------------------------------------------------------------

FieldSpec read_field(const File& file, const FileField& from, const std::vector<TableSpec>& tables, const Place& place) {
  want(from.table < tables.size(), place.of("table"), from.table, "one of the tables");
  want(from.is_bag <= 1, place.of("is_bag"), from.is_bag, "0 or 1");
  want(from.is_common <= 1, place.of("is_common"), from.is_common, "0 or 1");
  want_equal(place.of("zero"), from.zero, 0);
  const bool is_of_cuts = tables[from.table].kind == TABLE_CUTS;
  if (from.is_bag && is_of_cuts) refuse(place.of("is_bag"), "1 for a table of cuts", "0");
  const char* separator = file.name(from.separator, place.of("separator"), !from.is_bag);
  return {int64_t(from.table), int64_t(from.is_bag), int64_t(from.is_common), address_of(separator)};
}

void check_different(const std::vector<const char*>& names, const char* section) {
  for (size_t i = 0; i < names.size(); ++i)
    for (size_t j = 0; j < i; ++j)
      if (std::strcmp(names[i], names[j]) == 0)
        refuse({section, int64_t(i), "name"}, names[i], "another than that of " + text(uint64_t{j}));
}

// Each input is a column of one of the networks, once, and of `common` those of common fields alone.
void read_columns(const File& file, const FileHeader& header, const std::vector<FieldSpec>& fields, RankerSpec& to) {
  const uint64_t n = fields.size(), dim = header.dim, vectors = n * dim, inputs = vectors + n * (n - 1) / 2;
  const auto* common = file.array<int64_t>(header.common_columns, {"common_columns"});
  const auto* own = file.array<int64_t>(header.own_columns, {"own_columns"});
  const uint64_t common_count = header.common_columns.count, own_count = header.own_columns.count;
  want_equal({"common_columns and own_columns"}, common_count + own_count, inputs);
  std::vector<uint8_t> is_common(inputs), is_seen(inputs);
  for (uint64_t i = 0, pair = vectors; i < n; ++i) {
    for (uint64_t d = 0; d < dim; ++d) is_common[i * dim + d] = fields[i].is_common != 0;
    for (uint64_t j = i + 1; j < n; ++j) is_common[pair++] = fields[i].is_common && fields[j].is_common;
  }
  const auto check = [&](const int64_t* columns, uint64_t count, bool wants_common, const char* section) {
    for (uint64_t i = 0; i < count; ++i) {
      const int64_t column = columns[i];
      if (column < 0 || uint64_t(column) >= inputs || is_seen[size_t(column)]++)
        refuse({section, int64_t(i)}, text(column), "each input once, below " + text(inputs));
      if (wants_common && !is_common[size_t(column)])
        refuse({section, int64_t(i)}, text(column), "an input that common fields alone make");
    }
  };
  check(common, common_count, true, "common_columns");
  check(own, own_count, false, "own_columns");
  to.common_columns = address_of(common);
  to.common_count = int64_t(common_count);
  to.own_columns = address_of(own);
  to.own_count = int64_t(own_count);
}

// --- Layers -------------------------------------------------------------------------------------------------------

bool is_scale(double scale) { return scale == 0 || (scale >= std::ldexp(1, -126) && scale <= std::ldexp(1, 126)); }

CanonicalLayer read_layer(const File& file, const FileLayer& from, const Place& place) {
  const uint64_t rows = from.out_features, columns = from.in_features;
  want(columns >= 1 && columns <= MAX_IN_FEATURES, place.of("in_features"), columns, "1 to 2^24");
  want(rows >= 1 && rows <= MAX_OUT_FEATURES, place.of("out_features"), rows, "1 to 2^24");
  want(from.activation <= ACTIVATION_DICE, place.of("activation"), from.activation, "one of engine.h");
  for (const auto& [part, flag] : {std::pair<const char*, uint32_t>{"is_blocks", from.is_blocks},
                                   {"is_head", from.is_head}, {"takes_bias", from.takes_bias}})
    want(flag <= 1, place.of(part), flag, "0 or 1");
  want(from.tasks >= 1 && from.tasks <= kMaxTasks, place.of("tasks"), from.tasks, "1 to 4096");
  if (from.input_zero_point < 0 || from.input_zero_point > 255)
    refuse(place.of("input_zero_point"), text(from.input_zero_point), "0 to 255");
  if (!is_scale(from.input_scale)) refuse(place.of("input_scale"), text(from.input_scale), "0, or 2^-126 to 2^126");
  if (!(std::fabs(from.slope) <= double(FLT_MAX))) refuse(place.of("slope"), text(from.slope), "a finite float");

  const uint64_t block = from.is_blocks ? GROUP * QUAD : 1;
  want(from.values.count % block == 0, place.of("values"), from.values.count, "whole blocks of 64");
  const float* values = file.floats(from.values, place.of("values"));
  const auto* planes = file.array<uint8_t>(from.planes, place.of("planes"));
  if (planes) {
    const uint64_t grid_rows = from.is_blocks ? (rows + GROUP - 1) / GROUP : rows;
    const uint64_t grid_columns = from.is_blocks ? (columns + QUAD - 1) / QUAD : columns;
    want_equal(place.of("planes"), from.planes.count, from.tasks * grid_rows * ((grid_columns + 7) / 8));
  }
  if (from.bias.count) want_equal(place.of("bias"), from.bias.count, rows);
  const auto of_each = uint64_t(slope_rows(from.activation));
  if (from.slopes.count && !of_each)
    refuse(place.of("slopes"), "some for activation " + text(uint64_t{from.activation}), "none");
  if (from.slopes.count || from.activation == ACTIVATION_DICE)
    want_equal(place.of("slopes"), from.slopes.count, of_each * rows);
  CanonicalLayer to{};
  to.is_blocks = from.is_blocks;
  to.values = address_of(values);
  to.planes = address_of(planes);
  to.tasks = from.tasks;
  to.task = from.task;
  to.bias = address_of(file.floats(from.bias, place.of("bias")));
  to.in_features = from.in_features;
  to.out_features = from.out_features;
  to.nnz = int64_t(from.values.count / block);
  to.activation = from.activation;
  to.is_head = from.is_head;
  to.input_scale = from.input_scale;
  to.input_zero_point = from.input_zero_point;
  to.slope = from.slope;
  to.slopes = address_of(file.floats(from.slopes, place.of("slopes")));
  to.takes_bias = from.takes_bias;
  return to;
}

std::vector<CanonicalLayer> read_layers(const File& file, const Array& of, const char* section) {
  const auto* layers = file.array<FileLayer>(of, {section});
  std::vector<CanonicalLayer> to;
  for (uint64_t i = 0; i < of.count; ++i) to.push_back(read_layer(file, layers[i], {section, int64_t(i)}));
  return to;
}

// Each task's layers follow each other's width, from the own columns to one score.
void check_own_layers(const std::vector<CanonicalLayer>& layers, uint64_t tasks, int64_t inputs) {
  uint64_t heads = 0;
  int64_t width = inputs;
  for (size_t i = 0; i < layers.size(); ++i) {
    const Place place{"own_layers", int64_t(i)};
    want_equal(place.of("in_features"), uint64_t(layers[i].in_features), uint64_t(width));
    if (layers[i].is_head) want_equal(place.of("out_features"), uint64_t(layers[i].out_features), 1);
    heads += uint64_t(layers[i].is_head);
    width = layers[i].is_head ? inputs : layers[i].out_features;
  }
  if (layers.empty() || !layers.back().is_head) refuse({"own_layers"}, "no head at the end", "one per task");
  if (heads != tasks) refuse({"own_layers"}, text(heads) + " heads", text(tasks) + ", one per task");
}

// What the common network yields is the bias of the own network's first layers, task by task.
void check_common_layers(const std::vector<CanonicalLayer>& common, const std::vector<CanonicalLayer>& own,
                         uint64_t tasks, int64_t inputs) {
  want_equal({"common_layers"}, common.size(), inputs > 0 ? tasks : 0);
  size_t task = 0;
  for (size_t i = 0; i < own.size(); ++i) {
    const bool is_first = i == 0 || own[i - 1].is_head;
    want_equal({"own_layers", int64_t(i), "takes_bias"}, uint64_t(own[i].takes_bias), is_first && inputs > 0);
    if (!is_first || inputs == 0) continue;
    const CanonicalLayer& layer = common[task];
    const Place place{"common_layers", int64_t(task++)};
    want_equal(place.of("in_features"), uint64_t(layer.in_features), uint64_t(inputs));
    want_equal(place.of("out_features"), uint64_t(layer.out_features), uint64_t(own[i].out_features));
    want_equal(place.of("activation"), uint64_t(layer.activation), ACTIVATION_NONE);
    want_equal(place.of("is_head"), uint64_t(layer.is_head), 1);
    want_equal(place.of("takes_bias"), uint64_t(layer.takes_bias), 0);
  }
}

}  // namespace

EngineFile::EngineFile(const uint8_t* bytes, uint64_t size) : precision(0), ranker{} {
  const FileHeader header = checked_header(bytes, size);
  const File file(bytes, size);
  precision = header.precision;
  const uint64_t rows = read_embedding(file, header, ranker);

  const auto* file_tables = file.array<FileTable>(header.tables, {"tables"});
  for (uint64_t i = 0; i < header.tables.count; ++i)
    tables.push_back(read_table(file, file_tables[i], rows, {"tables", int64_t(i)}));

  want(header.fields.count >= 1 && header.fields.count <= kMaxFields, {"fields"}, header.fields.count, "1 to 4096");
  const auto* file_fields = file.array<FileField>(header.fields, {"fields"});
  uint64_t common_count = 0;
  for (uint64_t i = 0; i < header.fields.count; ++i) {
    const Place place{"fields", int64_t(i)};
    fields.push_back(read_field(file, file_fields[i], tables, place));
    field_names.push_back(file.name(file_fields[i].name, place.of("name"), false));
    if (i > 0 && fields[i - 1].is_bag && !fields[i].is_bag)
      refuse(place.of("is_bag"), "0 after a bag", "fields with one value first");
    common_count += file_fields[i].is_common;
  }
  check_different(field_names, "fields");
  want(common_count < header.fields.count, {"fields"}, common_count, "fewer common ones than there are");

  want(header.tasks.count >= 1 && header.tasks.count <= kMaxTasks, {"tasks"}, header.tasks.count, "1 to 4096");
  const auto* file_tasks = file.array<FileTask>(header.tasks, {"tasks"});
  for (uint64_t i = 0; i < header.tasks.count; ++i)
    task_names.push_back(file.name(file_tasks[i].name, {"tasks", int64_t(i), "name"}, false));
  check_different(task_names, "tasks");

  read_columns(file, header, fields, ranker);
  common_layers = read_layers(file, header.common_layers, "common_layers");
  own_layers = read_layers(file, header.own_layers, "own_layers");
  check_own_layers(own_layers, header.tasks.count, ranker.own_count);
  check_common_layers(common_layers, own_layers, header.tasks.count, ranker.common_count);

  ranker.tables = address_of(tables.data());
  ranker.table_count = int64_t(tables.size());
  ranker.fields = address_of(fields.data());
  ranker.field_count = int64_t(fields.size());
}

}  // namespace lt4rec
