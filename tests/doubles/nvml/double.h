/* What the parts of the double share: see libnvidia_ml.c. */
#pragma once
#define _GNU_SOURCE
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

typedef void *Device;
typedef unsigned int uint;
typedef unsigned long long u64;
enum { OK = 0, INVALID_ARGUMENT = 2, NOT_SUPPORTED = 3, NOT_FOUND = 6, INSUFFICIENT_SIZE = 7, TIMEOUT = 10, GPU_IS_LOST = 15, UNKNOWN = 999 };

/* Copies the value of `key` into `value` (512 bytes) and answers OK, or what the file says should go wrong. */
int look_up(const char *key, char *value);
/* The same for a call on a GPU or MIG device. */
int find(Device device, char *value, const char *call);
