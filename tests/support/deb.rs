//! The Debian package around the binary of the tests, from the metadata in `Cargo.toml` that `cargo deb` reads.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Builds the package in `work` and returns its path.
pub fn build(work: &Path, version: &str) -> PathBuf {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    let manifest: toml::Table = fs::read_to_string(here.join("Cargo.toml")).unwrap().parse().unwrap();
    let deb = &manifest["package"]["metadata"]["deb"];
    run(Command::new(here.join("systemd/package/pages")).arg(env!("CARGO_BIN_EXE_ringtail")));
    let binary = work.join("ringtail");
    if !binary.exists() {
        run(Command::new("strip").arg("-o").args([&binary, Path::new(env!("CARGO_BIN_EXE_ringtail"))]));
    }

    let tree = work.join(format!("tree-{version}"));
    for asset in deb["assets"].as_array().unwrap() {
        let asset: Vec<&str> = asset.as_array().unwrap().iter().map(|part| part.as_str().unwrap()).collect();
        let mode = u32::from_str_radix(asset[2], 8).unwrap();
        for source in sources(here, asset[0], &binary) {
            let target = tree.join(asset[1]);
            let target = if asset[1].ends_with('/') { target.join(source.file_name().unwrap()) } else { target };
            fs::create_dir_all(target.parent().unwrap()).unwrap();
            fs::copy(&source, &target).unwrap_or_else(|error| panic!("{}: {error}", source.display()));
            fs::set_permissions(&target, fs::Permissions::from_mode(mode)).unwrap();
        }
    }

    let control = tree.join("DEBIAN");
    fs::create_dir_all(&control).unwrap();
    let depends = deb["depends"].as_str().unwrap().replace("$auto", "libc6");
    let architecture = Command::new("dpkg").arg("--print-architecture").output().unwrap().stdout;
    let architecture = String::from_utf8(architecture).unwrap();
    let maintainer = deb["maintainer"].as_str().unwrap();
    let fields = format!(
        "Package: ringtail\nVersion: {version}\nArchitecture: {architecture}Depends: {depends}\nMaintainer: {maintainer}\n\
         Description: Ringtail, as its tests have it\n"
    );
    fs::write(control.join("control"), fields).unwrap();
    let conffiles: Vec<&str> =
        deb["conf-files"].as_array().unwrap().iter().map(|file| file.as_str().unwrap()).collect();
    fs::write(control.join("conffiles"), conffiles.join("\n") + "\n").unwrap();
    for script in fs::read_dir(here.join(deb["maintainer-scripts"].as_str().unwrap())).unwrap() {
        let script = script.unwrap().path();
        let name = script.file_name().unwrap();
        if name != "copyright" {
            fs::copy(&script, control.join(name)).unwrap();
        }
    }
    let package = work.join(format!("ringtail_{version}.deb"));
    run(Command::new("dpkg-deb").args(["--root-owner-group", "-Zgzip", "-z1", "--build"]).args([&tree, &package]));
    package
}

/// The same package with another version, in `work`.
pub fn renumber(package: &Path, work: &Path, version: &str) -> PathBuf {
    let (tree, renumbered) = (work.join(format!("tree-{version}")), work.join(format!("ringtail_{version}.deb")));
    run(Command::new("dpkg-deb").arg("--raw-extract").args([package, &tree]));
    let control = tree.join("DEBIAN/control");
    let fields = fs::read_to_string(&control).unwrap();
    let fields = fields.lines().map(|line| match line.starts_with("Version: ") {
        true => format!("Version: {version}\n"),
        false => format!("{line}\n"),
    });
    fs::write(&control, fields.collect::<String>()).unwrap();
    run(Command::new("dpkg-deb").args(["--root-owner-group", "-Zgzip", "-z1", "--build"]).args([&tree, &renumbered]));
    renumbered
}

/// The files that an asset names: one, or `*.1` in a directory.
fn sources(here: &Path, name: &str, binary: &Path) -> Vec<PathBuf> {
    if name == "target/release/ringtail" {
        return vec![binary.to_owned()];
    }
    match name.strip_suffix("*.1") {
        None => vec![here.join(name)],
        Some(directory) => {
            let files = fs::read_dir(here.join(directory)).unwrap().map(|file| file.unwrap().path());
            files.filter(|file| file.extension().is_some_and(|extension| extension == "1")).collect()
        }
    }
}

fn run(command: &mut Command) {
    let output = command.output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
}
