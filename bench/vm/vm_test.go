package vm

import (
	"bytes"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"testing"
)

// entries reads a cpio archive back, as the kernel does.
func entries(t *testing.T, b []byte) map[string]string {
	t.Helper()
	field := func(i int) int {
		n, err := strconv.ParseInt(string(b[6+8*i:14+8*i]), 16, 64)
		if err != nil {
			t.Fatal(err)
		}
		return int(n)
	}
	align := func(n int) int { return (n + 3) &^ 3 }
	out := make(map[string]string)
	for {
		if len(b) < 110 || string(b[:6]) != "070701" {
			t.Fatalf("no header in %q", b[:min(len(b), 20)])
		}
		size, nameLen, mode := field(6), field(11), field(1)
		name := string(b[110 : 110+nameLen-1])
		at := align(110 + nameLen)
		if name == "TRAILER!!!" {
			return out
		}
		out[name] = strconv.FormatInt(int64(mode), 8) + " " + string(b[at:at+size])
		b = b[align(at+size):]
	}
}

func TestArchive(t *testing.T) {
	var b bytes.Buffer
	a := newArchive(&b)
	a.add("dev", os.ModeDir|0o755, nil)
	a.add("init", 0o755, []byte("x"))
	a.add("modules/a.ko", 0o644, []byte("four"))
	if err := a.close(); err != nil {
		t.Fatal(err)
	}
	got := entries(t, b.Bytes())
	if len(got) != 3 || got["dev"] != "40755 " || got["init"] != "100755 x" || got["modules/a.ko"] != "100644 four" {
		t.Errorf("%v", got)
	}
}

func TestInitrd(t *testing.T) {
	dir := t.TempDir()
	write := func(path, content string) string {
		t.Helper()
		path = filepath.Join(dir, path)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
		return path
	}
	agent, program := write("agent", "A"), write("program", "P")
	write("kernel/drivers/net/igb/igb.ko.xz", "igb")
	write("kernel/drivers/net/igbvf.ko.xz", "igbvf")
	i := &Image{Modules: filepath.Join(dir, "kernel")}
	out := filepath.Join(dir, "initrd")
	if err := Initrd(out, i, agent, program); err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(out)
	if err != nil {
		t.Fatal(err)
	}
	got := entries(t, b)
	if got["init"] != "100755 A" || got["tcpcrypt"] != "100755 P" || got["modules/igb.ko.xz"] != "100644 igb" || got["modules/igbvf.ko.xz"] != "" {
		t.Errorf("%v", got)
	}
	if err := Initrd(out, i, filepath.Join(dir, "nothing"), program); err == nil {
		t.Error("an initrd without an agent")
	}
}

func TestKernelDependencies(t *testing.T) {
	const show = "Package: linux-image-amd64\nDepends: linux-base-amd64 (= 7.3.4-1), linux-image-7.3.4+deb13-amd64 (= 7.3.4-1), kmod | dracut\nRecommends: linux-image-9-amd64\n"
	if got := kernelDependencies(show); !slices.Equal(got, []string{"linux-image-7.3.4+deb13-amd64"}) {
		t.Errorf("%q", got)
	}
	const image = "Depends: linux-base-7.3.4-amd64, linux-binary-7.3.4-amd64 (= 7.3.4-1), linux-modules-7.3.4-amd64 (= 7.3.4-1)\n"
	if got := kernelDependencies(image); !slices.Equal(got, []string{"linux-binary-7.3.4-amd64", "linux-modules-7.3.4-amd64"}) {
		t.Errorf("%q", got)
	}
	if got := kernelDependencies("Package: x\n"); len(got) != 0 {
		t.Errorf("%q", got)
	}
}

func TestFindMirror(t *testing.T) {
	const targets = "Packages http://packages.example/apt/\nDEP-11 http://first.example/debian/\nPackages http://mirror.example/debian-security/\nPackages http://mirror.example/debian/\n"
	if got := findMirror(targets); got != "http://mirror.example/debian" {
		t.Errorf("%q", got)
	}
	if got := findMirror("Packages http://packages.example/apt/\n"); got != "" {
		t.Errorf("%q", got)
	}
}
