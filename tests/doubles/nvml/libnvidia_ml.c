/* A double of NVIDIA's management library, loaded by pynvml as libnvidia-ml.so.1.
 *
 * It answers from a text file named by NVML_DOUBLE, one `key value…` a line, read again whenever the file changes:
 *
 *   0.PowerUsage 305120            what nvmlDeviceGetPowerUsage answers for GPU 0
 *   0.ClockInfo.1 1980             a call with an argument
 *   0.Field.83.0 991               nvmlDeviceGetFieldValues, field 83, scope 0
 *   0.mig1.UUID MIG-…              the second MIG device of GPU 0
 *   0.gi3.Gpm.2 41.5               performance metric 2 of GPU instance 3
 *
 * A missing key answers NVML_ERROR_NOT_SUPPORTED. The value `!15` answers that error code, `hang` never returns, and
 * `crash` ends the process as a bug in the driver's library would. Events come from the file NVML_DOUBLE_EVENTS, one
 * `gpu xid repetitions` a line; as with the real library only events after registration are delivered.
 * Structures follow pynvml's; tests/integration/test_gpu_double.py compares their sizes. */
#include "double.h"
#include <pthread.h>
#include <signal.h>
#include <time.h>

typedef struct { char *key, *value; } Entry;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static char *text;
static Entry *entries;
static size_t entry_count;
static struct timespec read_at;
static ino_t read_inode;

static int by_key(const void *a, const void *b) { return strcmp(((const Entry *)a)->key, ((const Entry *)b)->key); }

static void reload(void) {
    const char *path = getenv("NVML_DOUBLE");
    struct stat status;
    if (!path || stat(path, &status)) { entry_count = 0; return; }
    if (text && status.st_ino == read_inode && !memcmp(&status.st_mtim, &read_at, sizeof read_at)) return;
    FILE *file = fopen(path, "r");
    if (!file) { entry_count = 0; return; }
    free(text);
    free(entries);
    text = calloc(1, (size_t)status.st_size + 2);
    size_t length = fread(text, 1, (size_t)status.st_size, file), lines = 1;
    fclose(file);
    for (size_t i = 0; i < length; i++) lines += text[i] == '\n';
    entries = calloc(lines, sizeof *entries);
    entry_count = 0;
    for (char *save, *line = strtok_r(text, "\n", &save); line; line = strtok_r(NULL, "\n", &save)) {
        char *space = strchr(line, ' ');
        if (line[0] == '#' || !space) continue;
        *space = 0;
        entries[entry_count++] = (Entry){line, space + 1};
    }
    qsort(entries, entry_count, sizeof *entries, by_key);
    read_at = status.st_mtim;
    read_inode = status.st_ino;
}

int look_up(const char *key, char *value) {
    pthread_mutex_lock(&lock);
    reload();
    Entry wanted = {(char *)key, NULL}, *found = bsearch(&wanted, entries, entry_count, sizeof wanted, by_key);
    if (found) snprintf(value, 512, "%s", found->value);
    pthread_mutex_unlock(&lock);
    if (!found) return NOT_SUPPORTED;
    if (!strcmp(value, "hang")) for (;;) pause();
    if (!strcmp(value, "crash")) raise(SIGSEGV);
    return value[0] == '!' ? atoi(value + 1) : OK;
}

/* Handles: GPU g is 0x1000·(g+1); its MIG device m adds m+1. */
static void key_for(char *key, Device device, const char *call) {
    uintptr_t handle = (uintptr_t)device;
    int gpu = (int)(handle / 0x1000) - 1, mig = (int)(handle % 0x1000) - 1;
    if (mig < 0) snprintf(key, 128, "%d.%s", gpu, call);
    else snprintf(key, 128, "%d.mig%d.%s", gpu, mig, call);
}
int find(Device device, char *value, const char *call) {
    char key[128];
    key_for(key, device, call);
    return look_up(key, value);
}
static int find_with(Device device, char *value, const char *call, int argument) {
    char name[96];
    snprintf(name, sizeof name, "%s.%d", call, argument);
    return find(device, value, name);
}
static void numbers(const char *value, u64 *out, int wanted) {
    char *cursor = (char *)value;
    for (int i = 0; i < wanted; i++) out[i] = strtoull(cursor, &cursor, 0);
}

static int text_answer(int result, const char *value, char *out, uint size) {
    if (result == OK) snprintf(out, size, "%s", value);
    return result;
}
/* The real library lists the GPUs once, when it is opened: one that is added later is not seen, one that leaves is lost. */
static uint listed;
static uint present(void) {
    char value[512];
    return look_up("Count", value) == OK ? (uint)atoi(value) : 0;
}
int nvmlInitWithFlags(uint flags) {
    char value[512];
    (void)flags;
    int result = look_up("Init", value);
    listed = present();
    return result == NOT_SUPPORTED ? OK : result;
}
int nvmlShutdown(void) { return OK; }
const char *nvmlErrorString(int code) {
    return code == UNKNOWN ? "Unknown Error" : code == 15 ? "GPU is lost" : code == NOT_SUPPORTED ? "Not Supported" : "Error";
}
#define SYSTEM_TEXT(name, key) \
    int name(char *out, uint size) { char value[512]; return text_answer(look_up(key, value), value, out, size); }
SYSTEM_TEXT(nvmlSystemGetDriverVersion, "DriverVersion")
SYSTEM_TEXT(nvmlSystemGetNVMLVersion, "NVMLVersion")
int nvmlSystemGetCudaDriverVersion_v2(int *out) {
    char value[512];
    int result = look_up("CudaDriverVersion", value);
    if (result == OK) *out = atoi(value);
    return result;
}
int nvmlDeviceGetCount_v2(uint *out) {
    char value[512];
    int result = look_up("CountCall", value);
    *out = listed;
    return result == NOT_SUPPORTED ? OK : result;
}
int nvmlDeviceGetHandleByIndex_v2(uint index, Device *out) {
    char value[512];
    Device device = (Device)(uintptr_t)(0x1000 * ((uintptr_t)index + 1));
    int result = find(device, value, "Handle");
    if (result != OK && result != NOT_SUPPORTED) return result;
    if (index >= listed) return INVALID_ARGUMENT;
    if (index >= present()) return GPU_IS_LOST;
    *out = device;
    return OK;
}

#define TEXT(call) \
    int nvmlDeviceGet##call(Device device, char *out, uint size) { \
        char value[512]; \
        return text_answer(find(device, value, #call), value, out, size); \
    }
TEXT(Name) TEXT(UUID) TEXT(Serial) TEXT(VbiosVersion)

#define UINT(call) \
    int nvmlDeviceGet##call(Device device, uint *out) { \
        char value[512]; \
        int result = find(device, value, #call); \
        if (result == OK) *out = (uint)strtoul(value, NULL, 0); \
        return result; \
    }
UINT(PerformanceState) UINT(PowerUsage) UINT(EnforcedPowerLimit) UINT(PowerManagementDefaultLimit) UINT(NumFans)
UINT(CurrPcieLinkGeneration) UINT(MaxPcieLinkGeneration) UINT(CurrPcieLinkWidth) UINT(MaxPcieLinkWidth)
UINT(PcieReplayCounter) UINT(PersistenceMode) UINT(ComputeMode) UINT(RetiredPagesPendingStatus) UINT(Architecture)
UINT(MaxMigDeviceCount) UINT(GpuInstanceId) UINT(ComputeInstanceId) UINT(MinorNumber)

#define U64(call) \
    int nvmlDeviceGet##call(Device device, u64 *out) { \
        char value[512]; \
        int result = find(device, value, #call); \
        if (result == OK) numbers(value, out, 1); \
        return result; \
    }
U64(TotalEnergyConsumption) U64(CurrentClocksEventReasons) U64(SupportedClocksEventReasons)

#define TWO(call) \
    int nvmlDeviceGet##call(Device device, uint *first, uint *second) { \
        char value[512]; \
        u64 parsed[2]; \
        int result = find(device, value, #call); \
        if (result == OK) { numbers(value, parsed, 2); *first = (uint)parsed[0]; *second = (uint)parsed[1]; } \
        return result; \
    }
TWO(EncoderUtilization) TWO(DecoderUtilization) TWO(JpgUtilization) TWO(OfaUtilization) TWO(EccMode) TWO(MigMode)
TWO(PowerManagementLimitConstraints) TWO(CudaComputeCapability)

#define UINT_OF(call) \
    int nvmlDeviceGet##call(Device device, int argument, uint *out) { \
        char value[512]; \
        int result = find_with(device, value, #call, argument); \
        if (result == OK) *out = (uint)strtoul(value, NULL, 0); \
        return result; \
    }
UINT_OF(ClockInfo) UINT_OF(MaxClockInfo) UINT_OF(TemperatureThreshold) UINT_OF(FanSpeed_v2) UINT_OF(NvLinkState)
UINT_OF(PcieThroughput)

/* Structures of 64-bit numbers after an optional version word. */
#define U64_STRUCT(call, symbol, skip, wanted) \
    int symbol(Device device, u64 *out) { \
        char value[512]; \
        int result = find(device, value, call); \
        if (result == OK) numbers(value, out + skip, wanted); \
        return result; \
    }
U64_STRUCT("MemoryInfo_v2", nvmlDeviceGetMemoryInfo_v2, 1, 4)
U64_STRUCT("MemoryInfo", nvmlDeviceGetMemoryInfo, 0, 3)
U64_STRUCT("BAR1MemoryInfo", nvmlDeviceGetBAR1MemoryInfo, 0, 3)
U64_STRUCT("SramEccErrorStatus", nvmlDeviceGetSramEccErrorStatus, 1, 12)

int nvmlDeviceGetUtilizationRates(Device device, uint *out) {
    char value[512];
    u64 parsed[2];
    int result = find(device, value, "UtilizationRates");
    if (result == OK) { numbers(value, parsed, 2); out[0] = (uint)parsed[0]; out[1] = (uint)parsed[1]; }
    return result;
}
typedef struct { char legacy[16]; uint domain, bus, device, id, subsystem; char bus_id[32]; } Pci;
int nvmlDeviceGetPciInfo_v3(Device device, Pci *out) {
    char value[512];
    int result = find(device, value, "PciInfo");
    if (result == OK) { memset(out, 0, sizeof *out); snprintf(out->bus_id, sizeof out->bus_id, "%.31s", value); }
    return result;
}
int nvmlDeviceGetTotalEccErrors(Device device, int type, int counter, u64 *out) {
    char name[64], value[512];
    snprintf(name, sizeof name, "TotalEccErrors.%d.%d", type, counter);
    int result = find(device, value, name);
    if (result == OK) numbers(value, out, 1);
    return result;
}
int nvmlDeviceGetViolationStatus(Device device, int policy, u64 *out) {
    char value[512];
    int result = find_with(device, value, "ViolationStatus", policy);
    if (result == OK) { out[0] = 0; numbers(value, out + 1, 1); }
    return result;
}
int nvmlDeviceGetRemappedRows(Device device, uint *correctable, uint *uncorrectable, uint *pending, uint *failure) {
    char value[512];
    u64 parsed[4];
    int result = find(device, value, "RemappedRows");
    if (result != OK) return result;
    numbers(value, parsed, 4);
    *correctable = (uint)parsed[0]; *uncorrectable = (uint)parsed[1]; *pending = (uint)parsed[2]; *failure = (uint)parsed[3];
    return OK;
}
int nvmlDeviceGetRowRemapperHistogram(Device device, uint *out) {
    char value[512];
    u64 parsed[5];
    int result = find(device, value, "RowRemapperHistogram");
    if (result == OK) { numbers(value, parsed, 5); for (int i = 0; i < 5; i++) out[i] = (uint)parsed[i]; }
    return result;
}
int nvmlDeviceGetRetiredPages(Device device, int cause, uint *count, u64 *addresses) {
    char value[512];
    int result = find_with(device, value, "RetiredPages", cause);
    if (result != OK) return result;
    uint pages = (uint)atoi(value), room = *count;
    *count = pages;
    if (room < pages || (!addresses && pages)) return INSUFFICIENT_SIZE;
    for (uint i = 0; addresses && i < pages; i++) addresses[i] = 0x1000ULL * (i + 1);
    return OK;
}
typedef struct { uint version, argument; int answer; } Versioned;
int nvmlDeviceGetTemperatureV(Device device, Versioned *request) {
    char value[512];
    int result = find_with(device, value, "Temperature", (int)request->argument);
    if (result == OK) request->answer = atoi(value);
    return result;
}
int nvmlDeviceGetFanSpeedRPM(Device device, Versioned *request) {
    char value[512];
    int result = find_with(device, value, "FanSpeedRPM", (int)request->argument);
    if (result == OK) request->answer = atoi(value);
    return result;
}
/* The older names of calls: drivers before 2024 know only these. Their keys are the older names as well. */
int nvmlDeviceGetTemperature(Device device, int sensor, uint *out) {
    char value[512];
    int result = find_with(device, value, "OlderTemperature", sensor);
    if (result == OK) *out = (uint)atoi(value);
    return result;
}
U64(CurrentClocksThrottleReasons) U64(SupportedClocksThrottleReasons)
typedef struct { uint version; int margin; } Margin;
int nvmlDeviceGetMarginTemperature(Device device, Margin *request) {
    char value[512];
    int result = find(device, value, "MarginTemperature");
    if (result == OK) request->margin = atoi(value);
    return result;
}

typedef struct { uint field, scope; int64_t timestamp, latency; uint type; int result; union { double d; u64 u; } value; } Field;
enum { TYPE_DOUBLE = 0, TYPE_U64 = 3, TYPE_S64 = 4 };
int nvmlDeviceGetFieldValues(Device device, int count, Field *fields) {
    char name[64], value[512];
    int whole = find(device, value, "FieldValues");
    if (whole != OK && whole != NOT_SUPPORTED) return whole;
    for (int i = 0; i < count; i++) {
        snprintf(name, sizeof name, "Field.%u.%u", fields[i].field, fields[i].scope);
        fields[i].result = find(device, value, name);
        if (fields[i].result != OK) continue;
        if (strchr(value, '.')) { fields[i].type = TYPE_DOUBLE; fields[i].value.d = atof(value); }
        else { fields[i].type = value[0] == '-' ? TYPE_S64 : TYPE_U64; numbers(value, &fields[i].value.u, 1); }
    }
    return OK;
}

typedef struct { uint pid; u64 memory; uint gpu_instance, compute_instance; } Process;
int nvmlDeviceGetComputeRunningProcesses_v3(Device device, uint *count, Process *out) {
    char value[512];
    int result = find(device, value, "ComputeRunningProcesses");
    if (result != OK) return result;
    Process found[32];
    uint processes = 0;
    for (char *save, *word = strtok_r(value, " ", &save); word && processes < 32; word = strtok_r(NULL, " ", &save)) {
        char *colon = strchr(word, ':');
        if (colon) found[processes++] = (Process){(uint)atoi(word), strtoull(colon + 1, NULL, 0), ~0u, ~0u};
    }
    uint room = *count;
    *count = processes;
    if (processes && (!out || room < processes)) return INSUFFICIENT_SIZE;
    for (uint i = 0; i < processes; i++) out[i] = found[i];
    return OK;
}

int nvmlDeviceGetMigDeviceHandleByIndex(Device device, uint index, Device *out) {
    char value[512];
    Device mig = (Device)((uintptr_t)device + index + 1);
    if (find(mig, value, "UUID") != OK) return NOT_FOUND;
    *out = mig;
    return OK;
}

typedef struct { char prefix[32]; } GpmSample;
int nvmlGpmSampleAlloc(GpmSample **out) { return (*out = calloc(1, sizeof **out)) ? OK : 20; }
int nvmlGpmSampleFree(GpmSample *sample) { free(sample); return OK; }
int nvmlGpmQueryDeviceSupport(Device device, uint *support) {
    char value[512];
    int result = find(device, value, "GpmSupport");
    support[1] = result == OK ? (uint)atoi(value) : 0;
    return result == NOT_SUPPORTED ? OK : result;
}
int nvmlGpmSampleGet(Device device, GpmSample *sample) {
    char value[512];
    int result = find(device, value, "GpmSample");
    key_for(sample->prefix, device, "Gpm");
    return result == NOT_SUPPORTED ? OK : result;
}
int nvmlGpmMigSampleGet(Device device, uint instance, GpmSample *sample) {
    char name[32];
    snprintf(name, sizeof name, "gi%u.Gpm", instance);
    key_for(sample->prefix, device, name);
    return OK;
}
typedef struct { uint metric; int result; double value; char *names[3]; } GpmMetric;
typedef struct { uint version, count; GpmSample *first, *second; GpmMetric metrics[]; } GpmRequest;
int nvmlGpmMetricsGet(GpmRequest *request) {
    if (strcmp(request->first->prefix, request->second->prefix)) return INVALID_ARGUMENT;
    for (uint i = 0; i < request->count; i++) {
        char key[128], value[512];
        snprintf(key, sizeof key, "%s.%u", request->second->prefix, request->metrics[i].metric);
        request->metrics[i].result = look_up(key, value);
        if (request->metrics[i].result == OK) request->metrics[i].value = atof(value);
    }
    return OK;
}

/* For the test that compares the double with pynvml. */
uint nvml_double_size(const char *structure) {
    struct { const char *name; size_t size; } sizes[] = {
        {"nvmlPciInfo_t", sizeof(Pci)}, {"c_nvmlFieldValue_t", sizeof(Field)}, {"c_nvmlProcessInfo_v3_t", sizeof(Process)},
        {"c_nvmlGpmMetric_t", sizeof(GpmMetric)}, {"c_nvmlTemperature_v1_t", sizeof(Versioned)},
        {"c_nvmlMarginTemperature_v1_t", sizeof(Margin)},
    };
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++)
        if (!strcmp(sizes[i].name, structure)) return (uint)sizes[i].size;
    return 0;
}
