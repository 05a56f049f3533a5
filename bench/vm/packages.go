package vm

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
)

const (
	// release is the Debian release that QEMU is taken from, and kernels the
	// suite with the newest kernel for it: zero-copy in igb and virtio-net is
	// younger than the release's own one.
	release = "trixie"
	kernels = "trixie-backports"

	emulator = "qemu-system-x86"
	kernel   = "linux-image-amd64"
	keyring  = "/usr/share/keyrings/debian-archive-keyring.gpg"

	// complete is written last: what it is in needs no network. It holds the
	// version of the kernel, and which modules are unpacked.
	complete = "complete"
)

// Image is what guests are booted with.
type Image struct {
	Kernel  string // path of the kernel image
	Version string // of the kernel
	Modules string // folder of its modules
	root    string // the unpacked packages
}

// Fetch returns the image in the cache folder, and makes it there first if it
// is not: it resolves the versions through the metapackages, downloads with apt
// what is missing (a download that was interrupted goes on), and unpacks. The
// mirror is that of the machine's Debian sources, or the environment variable
// MIRROR. It needs apt, dpkg-deb and tar, and no privilege.
func Fetch(ctx context.Context, cache string, log func(string, ...any)) (*Image, error) {
	cache, err := filepath.Abs(cache)
	if err != nil {
		return nil, err
	}
	done := filepath.Join(cache, complete)
	unpacked := strings.Join(Modules, " ")
	if text, err := os.ReadFile(done); err == nil {
		if version, modules, _ := strings.Cut(strings.TrimSpace(string(text)), "\n"); modules == unpacked {
			return image(cache, version)
		}
	}
	for _, dir := range []string{"lists/partial", "archives/partial"} {
		if err := os.MkdirAll(filepath.Join(cache, dir), 0o755); err != nil {
			return nil, err
		}
	}
	a := &apt{ctx: ctx, cache: cache}
	if err := a.configure(); err != nil {
		return nil, err
	}
	log("reading the package lists of %s and %s", release, kernels)
	if _, err := a.run("apt-get", "update"); err != nil {
		return nil, err
	}
	packages, err := a.kernelPackages(kernel, 0)
	if err != nil {
		return nil, err
	}
	var wanted []string
	for _, p := range packages {
		wanted = append(wanted, p+"/"+kernels)
	}
	log("downloading %s, %s and what they need", emulator, strings.Join(packages, ", "))
	if _, err := a.run("apt-get", append([]string{"--yes", "--no-install-recommends", "--download-only", "install", emulator}, wanted...)...); err != nil {
		return nil, err
	}
	version, err := unpack(ctx, cache, log)
	if err != nil {
		return nil, err
	}
	if err := os.WriteFile(done, []byte(version+"\n"+unpacked+"\n"), 0o644); err != nil {
		return nil, err
	}
	return image(cache, version)
}

func image(cache, version string) (*Image, error) {
	root := filepath.Join(cache, "root")
	i := &Image{
		Kernel:  filepath.Join(root, "usr/lib/modules", version, "vmlinuz"),
		Version: version,
		Modules: filepath.Join(root, "usr/lib/modules", version, "kernel"),
		root:    root,
	}
	for _, path := range []string{i.Kernel, i.Modules, i.emulator()} {
		if _, err := os.Stat(path); err != nil {
			return nil, fmt.Errorf("the cache folder %s is not what it should be, remove it: %w", cache, err)
		}
	}
	return i, nil
}

func (i *Image) emulator() string { return filepath.Join(i.root, "usr/bin/qemu-system-x86_64") }

// apt runs the package tools with all their state in the cache folder, and as
// if nothing were installed, so that the emulator's libraries come along.
type apt struct {
	ctx   context.Context
	cache string
}

func (a *apt) configure() error {
	mirror := os.Getenv("MIRROR")
	if mirror == "" {
		var err error
		if mirror, err = a.mirror(); err != nil {
			return err
		}
	}
	if _, err := os.Stat(keyring); err != nil {
		return fmt.Errorf("the keys of the Debian archive (package debian-archive-keyring): %w", err)
	}
	var sources strings.Builder
	for _, suite := range []string{release, kernels} {
		fmt.Fprintf(&sources, "deb [arch=amd64 signed-by=%s] %s %s main\n", keyring, mirror, suite)
	}
	if err := os.WriteFile(filepath.Join(a.cache, "sources.list"), []byte(sources.String()), 0o644); err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(a.cache, "status"), nil, 0o644)
}

// mirror finds a Debian archive among the machine's own sources.
func (a *apt) mirror() (string, error) {
	out, err := exec.CommandContext(a.ctx, "apt-get", "indextargets", "--format", "$(CREATED_BY) $(REPO_URI)").Output()
	if err != nil {
		return "", fmt.Errorf("apt-get indextargets: %w", err)
	}
	if uri := findMirror(string(out)); uri != "" {
		return uri, nil
	}
	return "", errors.New("the machine has no Debian package source: name a mirror in the environment variable MIRROR")
}

// findMirror takes the first archive whose last part is "debian": those of
// security updates and of other vendors have not the suites.
func findMirror(targets string) string {
	for line := range strings.Lines(targets) {
		kind, uri, _ := strings.Cut(strings.TrimSpace(line), " ")
		uri = strings.TrimSuffix(uri, "/")
		if kind == "Packages" && strings.HasSuffix(uri, "/debian") {
			return uri
		}
	}
	return ""
}

func (a *apt) run(command string, args ...string) (string, error) {
	c := func(name, path string) string { return "-o" + name + "=" + filepath.Join(a.cache, path) }
	options := []string{
		"-q", c("Dir::Etc::sourcelist", "sources.list"), "-oDir::Etc::sourceparts=-", c("Dir::State::Lists", "lists"),
		c("Dir::State::status", "status"), c("Dir::Cache", "."), c("Dir::Cache::archives", "archives"),
		"-oDir::Cache::pkgcache=", "-oDir::Cache::srcpkgcache=",
		"-oAPT::Sandbox::User=root", "-oAcquire::Languages=none", "-oAcquire::Retries=3", "-oAPT::Architecture=amd64", "-oAPT::Architectures::=amd64",
		"-oAcquire::IndexTargets::deb::DEP-11::DefaultEnabled=false", "-oDebug::NoLocking=1",
	}
	cmd := exec.CommandContext(a.ctx, command, append(options, args...)...)
	cmd.Env = append(os.Environ(), "LC_ALL=C", "DEBIAN_FRONTEND=noninteractive")
	var stderr strings.Builder
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		why := strings.TrimSpace(stderr.String())
		if why == "" {
			why = strings.TrimSpace(string(out))
		}
		return "", fmt.Errorf("%s %s: %w\n%s", command, args[0], err, why)
	}
	return string(out), nil
}

// kernelPackages follows the dependencies of a kernel's metapackage to the
// packages with the kernel and its modules.
func (a *apt) kernelPackages(name string, depth int) ([]string, error) {
	args := []string{"show", "--no-all-versions", name}
	if depth == 0 {
		args[2] = name + "/" + kernels
	}
	out, err := a.run("apt-cache", args...)
	if err != nil {
		return nil, fmt.Errorf("no package %s in %s: %w", name, kernels, err)
	}
	var found []string
	for _, p := range kernelDependencies(out) {
		if depth < 4 && !slices.Contains(found, p) {
			further, err := a.kernelPackages(p, depth+1)
			if err != nil {
				return nil, err
			}
			found = append(found, further...)
		}
	}
	slices.Sort(found)
	found = slices.Compact(found)
	if len(found) == 0 {
		found = []string{name}
	}
	if depth == 0 && slices.Equal(found, []string{name}) {
		return nil, fmt.Errorf("package %s names no kernel", name)
	}
	return found, nil
}

var kernelPackage = regexp.MustCompile(`\blinux-(?:image|binary|modules)-\d[^ ,(]*`)

// kernelDependencies returns the packages of a kernel version that a package's
// description depends on.
func kernelDependencies(show string) []string {
	for line := range strings.Lines(show) {
		if list, ok := strings.CutPrefix(line, "Depends:"); ok {
			return kernelPackage.FindAllString(list, -1)
		}
	}
	return nil
}

// unpack unpacks the packages, of the modules only the ones that are needed,
// and returns the kernel's version.
func unpack(ctx context.Context, cache string, log func(string, ...any)) (string, error) {
	root := filepath.Join(cache, "root")
	if err := os.RemoveAll(root); err != nil {
		return "", err
	}
	if err := os.MkdirAll(root, 0o755); err != nil {
		return "", err
	}
	archives, err := filepath.Glob(filepath.Join(cache, "archives", "*.deb"))
	if err != nil {
		return "", err
	}
	log("unpacking %d packages", len(archives))
	for _, path := range archives {
		args := []string{"--extract", "--file=-", "--directory=" + root, "--no-same-owner"}
		if strings.HasPrefix(filepath.Base(path), "linux-modules-") {
			args = append(args, "--wildcards", "--no-anchored")
			for _, m := range Modules {
				args = append(args, "*/"+m+".ko*")
			}
		}
		if err := pipe(exec.CommandContext(ctx, "dpkg-deb", "--fsys-tarfile", path), exec.CommandContext(ctx, "tar", args...)); err != nil {
			return "", fmt.Errorf("unpack %s: %w", filepath.Base(path), err)
		}
	}
	images, err := filepath.Glob(filepath.Join(root, "usr/lib/modules/*/vmlinuz"))
	if err != nil {
		return "", err
	}
	if len(images) != 1 {
		return "", fmt.Errorf("%d kernels in the packages, expected one: remove %s", len(images), cache)
	}
	return filepath.Base(filepath.Dir(images[0])), nil
}

// pipe runs from | to.
func pipe(from, to *exec.Cmd) (err error) {
	var stderr strings.Builder
	from.Stderr, to.Stderr = &stderr, &stderr
	if to.Stdin, err = from.StdoutPipe(); err != nil {
		return err
	}
	if err := to.Start(); err != nil {
		return err
	}
	if err = errors.Join(from.Run(), to.Wait()); err != nil {
		return fmt.Errorf("%w: %s", err, strings.TrimSpace(stderr.String()))
	}
	return nil
}
