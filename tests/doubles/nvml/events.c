/* XID events of the double: NVML_DOUBLE_EVENTS holds one `gpu xid repetitions` a line. */
#include "double.h"

typedef struct { Device registered[64]; uint count; long offset; u64 pending; int gpu, xid; } EventSet;
typedef struct { Device device; u64 type, data; uint gpu_instance, compute_instance; } Event;
int nvmlEventSetCreate(EventSet **out) {
    const char *path = getenv("NVML_DOUBLE_EVENTS");
    struct stat status;
    char value[512];
    int result = look_up("EventSetCreate", value);
    if (result != OK && result != NOT_SUPPORTED) return result;
    *out = calloc(1, sizeof **out);
    (*out)->offset = path && !stat(path, &status) ? status.st_size : 0;
    return OK;
}
int nvmlEventSetFree(EventSet *set) { free(set); return OK; }
int nvmlDeviceGetSupportedEventTypes(Device device, u64 *out) { (void)device; *out = 0xB; return OK; }
int nvmlDeviceRegisterEvents(Device device, u64 types, EventSet *set) {
    char value[512];
    int result = find(device, value, "RegisterEvents");
    (void)types;
    if (result != OK && result != NOT_SUPPORTED) return result;
    set->registered[set->count++ % 64] = device;
    return OK;
}
static int next_event(EventSet *set) {
    const char *path = getenv("NVML_DOUBLE_EVENTS");
    FILE *file = path ? fopen(path, "r") : NULL;
    if (!file) return 0;
    int gpu, xid, found = 0;
    u64 repetitions;
    fseek(file, set->offset, SEEK_SET);
    while (!found && fscanf(file, "%d %d %llu\n", &gpu, &xid, &repetitions) == 3) {
        set->offset = ftell(file);
        for (uint i = 0; i < set->count; i++)
            found |= set->registered[i] == (Device)(uintptr_t)(0x1000 * (gpu + 1));
    }
    fclose(file);
    if (found) { set->gpu = gpu; set->xid = xid; set->pending = repetitions; }
    return found;
}
int nvmlEventSetWait_v2(EventSet *set, Event *out, uint timeout) {
    char value[512];
    int result = look_up("EventSetWait", value);
    if (result != OK && result != NOT_SUPPORTED) return result;
    for (uint waited = 0; !set->pending && !next_event(set); waited += 2) {
        if (waited >= timeout) return TIMEOUT;
        usleep(2000);
    }
    set->pending--;
    *out = (Event){(Device)(uintptr_t)(0x1000 * (set->gpu + 1)), 8, (u64)set->xid, ~0u, ~0u};
    return OK;
}
