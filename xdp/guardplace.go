package xdp

import (
	"bufio"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// netnsCookie returns the number of the calling thread's network namespace, by
// which BPF programs know it. It is not given to another one until a reboot.
func netnsCookie() (cookie uint64, err error) {
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return 0, err
	}
	defer unix.Close(fd)
	if err := getsockopt(fd, unix.SOL_SOCKET, unix.SO_NETNS_COOKIE, &cookie); err != nil {
		return 0, fmt.Errorf("read the cookie of the network namespace: %w", err)
	}
	return cookie, nil
}

// Where else a file system may be: a process that was started in a network
// namespace by "ip netns exec" has another /sys, and the host's below this.
const hostRoot = "/proc/1/root"

// findBPFFS returns the directory of a BPF file system in which links outlive
// the process: the given one, or where the system has it.
func findBPFFS(dir string) (string, error) {
	if dir != "" {
		if !isFileSystem(dir, unix.BPF_FS_MAGIC) {
			return "", fmt.Errorf("%s is not in a BPF file system: mount -t bpf bpf %s", dir, dir)
		}
		return dir, nil
	}
	const usual = "/sys/fs/bpf"
	for _, dir := range []string{usual, hostRoot + usual} {
		if isFileSystem(dir, unix.BPF_FS_MAGIC) {
			return dir, nil
		}
	}
	return "", fmt.Errorf("no BPF file system is mounted: mount -t bpf bpf %s", usual)
}

func isFileSystem(dir string, magic int64) bool {
	var st unix.Statfs_t
	return unix.Statfs(dir, &st) == nil && int64(uint32(st.Type)) == magic
}

// CheckCgroup tells whether dir can be a GuardConfig.Cgroup.
func CheckCgroup(dir string) error {
	if !isFileSystem(dir, unix.CGROUP2_SUPER_MAGIC) {
		return fmt.Errorf("%s is not a directory of cgroup version 2", dir)
	}
	return nil
}

// openCgroup opens the given directory of the cgroup v2 hierarchy, or the root
// of it.
func openCgroup(dir string) (*os.File, error) {
	if dir != "" {
		if err := CheckCgroup(dir); err != nil {
			return nil, err
		}
		return os.Open(dir)
	}
	for _, place := range []struct{ mounts, root string }{
		{"/proc/self/mountinfo", ""}, {"/proc/1/mountinfo", hostRoot},
	} {
		dir, err := cgroupMount(place.mounts)
		if err != nil {
			continue
		}
		if dir = filepath.Join(place.root, dir); isFileSystem(dir, unix.CGROUP2_SUPER_MAGIC) {
			return os.Open(dir)
		}
	}
	// Never where it is mounted: this resets the options of the hierarchy.
	f, err := mountCgroup()
	if err != nil {
		return nil, fmt.Errorf("cgroup version 2 is not mounted and cannot be: %w", err)
	}
	return f, nil
}

var errNoMount = errors.New("not mounted")

// cgroupMount returns where a table of mounts has the root of the cgroup v2
// hierarchy.
func cgroupMount(table string) (string, error) {
	f, err := os.Open(table)
	if err != nil {
		return "", err
	}
	defer f.Close()
	for lines := bufio.NewScanner(f); lines.Scan(); {
		// proc(5): id, parent, device, root, mount point, options, optional
		// fields, "-", type, source, options.
		before, after, _ := strings.Cut(lines.Text(), " - ")
		fields, kind := strings.Fields(before), strings.Fields(after)
		if len(fields) >= 5 && len(kind) > 0 && kind[0] == "cgroup2" && fields[3] == "/" {
			return unescapeMount(fields[4]), nil
		}
	}
	return "", errNoMount
}

var mountEscapes = strings.NewReplacer(`\040`, " ", `\011`, "\t", `\012`, "\n", `\134`, `\`)

func unescapeMount(s string) string { return mountEscapes.Replace(s) }

// mountCgroup returns the root of the cgroup v2 hierarchy, mounted nowhere.
func mountCgroup() (*os.File, error) {
	fs, err := unix.Fsopen("cgroup2", unix.FSOPEN_CLOEXEC)
	if err != nil {
		return nil, err
	}
	defer unix.Close(fs)
	if err := unix.FsconfigCreate(fs); err != nil {
		return nil, err
	}
	mount, err := unix.Fsmount(fs, unix.FSMOUNT_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	defer unix.Close(mount)
	fd, err := unix.Openat(mount, ".", unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	return os.NewFile(uintptr(fd), "cgroup2"), nil
}
